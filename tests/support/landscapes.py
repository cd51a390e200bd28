"""A space of shapes at three schemes whose costs, losses and harms are known, so that the best choice is, too."""

from __future__ import annotations

import random
from fractions import Fraction

from amoeba_plugin.deployment.budget import Budget, Limit
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.problem import Choice, Costs, Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.shape import ShapeSpace

SPACE = ShapeSpace(tuple(range(12, 5, -1)), tuple(Fraction(n, 8) for n in range(8, 3, -1)))
BITS = {"F16": 16.0, "Q8_0": 8.0, "Q4_0": 4.0}


def sure(value: float) -> Quality:
    return Quality(value, value, value)


def landscape(seed: int, schemes: str = "F16,Q8_0,Q4_0", surprise: float = 0.0) -> tuple[Problem, dict[Choice, float]]:
    """Bytes go by bits, losses fall with size, and a scheme harms every shape by a draw of its own.

    Returns:
        The problem, and the true loss of every choice, which only its engine tells.
    """
    draw = random.Random(seed)
    loss = {shape: 4 - 0.1 * shape.depth - float(shape.width) + draw.uniform(0, 0.1) for shape in SPACE}
    harm = {"F16": 0.0, "Q8_0": 0.01, "Q4_0": 0.3}
    budget = Budget.parse(f"llama-cpp:{schemes} file<=1MB")
    bits = [BITS[point.scheme] for point in budget.points]
    limit = Limit("file", draw.uniform(4 * min(bits), 11 * max(bits)))  # of 3 to 12 layers' worth
    choices = [Choice(shape, point) for shape in SPACE for point in budget.points]
    true = {each: loss[each.shape] + harm[each.point.scheme] * draw.uniform(0.5, 1.5) for each in choices}
    bytes_of = {each: each.shape.depth * float(each.shape.width) * BITS[each.point.scheme] for each in choices}
    real = {each: size * (1 + draw.uniform(0, surprise)) for each, size in bytes_of.items()}

    def costs(found: float, measured: bool) -> Costs:
        return {limit: Prediction(found, found, found, measured)}

    problem = Problem(
        SPACE, Budget(budget.points, (limit,)), lambda each: costs(bytes_of[each], False),
        lambda shape: sure(loss[shape]), lambda some: {each: costs(real[each], True) for each in some},
        harm=lambda each: sure(true[each] - loss[each.shape]),
        exact=[point for point in budget.points if point.scheme == "F16"],
    )  # fmt: skip
    kept = {each: value for each, value in true.items() if real[each] <= limit.most}
    return problem, kept
