"""The best shape within a budget: against all shapes, in few evaluations, measured where an interval straddles it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest

from amoeba_plugin.deployment.budget import Budget, Limit
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.exhaustive import exhaustive
from amoeba_plugin.deployment.search.hierarchical import hierarchical
from amoeba_plugin.deployment.search.problem import Choice, Costs, Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.errors import BudgetError
from amoeba_plugin.shape import ShapeSpace, SubnetShape

SPACE = ShapeSpace(tuple(range(32, 18, -1)), tuple(Fraction(n, 16) for n in range(16, 8, -1)))  # 112 shapes
BEST = Quality(-1.0, -1.0, -1.0)


def landscape(seed: int, noise: float = 0.0, spread: float = 0.0, measurable: bool = True) -> Problem:
    """A space whose losses fall with size, nearly, and whose costs do not go by the same sizes."""
    draw = random.Random(seed)
    by_depth, by_width, mixed = draw.uniform(0.5, 2), draw.uniform(0.5, 2), draw.uniform(0.2, 0.8)
    jitter = {shape: draw.uniform(-noise, noise) for shape in SPACE}
    true = {shape: 1e-3 * (1 + shape.depth * (mixed + (1 - mixed) * float(shape.width))) for shape in SPACE}
    guessed = {shape: cost * (1 + draw.uniform(-spread, spread)) for shape, cost in true.items()}
    limit = Limit("decode", draw.uniform(min(true.values()), max(true.values())))

    def loss(shape: SubnetShape) -> Quality:
        value = by_depth * (1 - shape.depth / 32) ** 1.5 + by_width * (1 - float(shape.width)) ** 2 + jitter[shape]
        return Quality(value, value, value)

    def predict(choice: Choice) -> Costs:
        value = guessed[choice.shape]
        return {limit: Prediction(value, value * (1 - spread), value * (1 + spread))}

    def measure(choices: Sequence[Choice]) -> dict[Choice, Costs]:
        assert choices
        costs = {choice: true[choice.shape] for choice in choices}
        return {choice: {limit: Prediction(cost, cost, cost, measured=True)} for choice, cost in costs.items()}

    budget = Budget.parse(f"torch:fp32 decode<={limit.most * 1e3:.9f}ms")
    budget = Budget(budget.points, (limit,))
    return Problem(SPACE, budget, predict, loss, measure if measurable else None)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_hierarchical_is_as_good_as_all_in_a_fifth_of_the_evaluations(spread: float):
    near, evaluated = [], []
    for seed in range(60):
        every, few = landscape(seed, 0.003, spread), landscape(seed, 0.003, spread)
        best, found = exhaustive(every), hierarchical(few)
        near.append(few.loss(found) - every.loss(best) < 0.01)
        evaluated.append(len(few.qualities) / len(SPACE))
    assert sum(near) >= 0.9 * len(near)
    assert max(evaluated) <= 0.2


def test_what_is_chosen_keeps_the_budget_when_it_is_measured():
    for seed in range(40):
        for search in (exhaustive, hierarchical):
            problem = landscape(seed, spread=0.1)
            chosen = search(problem)
            (cost,) = problem.measure([chosen])[chosen].values()  # type: ignore[misc]
            assert cost.value <= problem.budget.limits[0].most


def test_shapes_of_all_depths_are_measured_together():
    """Each call starts an engine some times, so there are as many as widths at most, not as shapes."""
    for seed in range(20):
        problem, calls = landscape(seed, spread=0.3), []
        measure = problem.measure
        assert measure is not None
        problem.measure = lambda choices, of=measure, to=calls: (to.append(len(choices)), of(choices))[1]  # type: ignore[misc]
        hierarchical(problem)
        assert len(calls) <= len(SPACE.widths) + 3  # and those that are tried beside the best
        assert max(calls, default=0) > 1 or sum(calls) <= 1


def test_nothing_is_measured_where_predictions_are_sure():
    problem = landscape(3)
    exhaustive(problem)
    assert problem.measured == {}


def test_the_best_is_not_always_the_largest():
    for seed in range(20):
        problem = landscape(seed)
        largest = exhaustive(problem)
        at = SPACE.depths.index(largest.shape.depth) + 1
        if at == len(SPACE.depths):
            continue
        better = SubnetShape(SPACE.depths[at], largest.shape.width)
        plain = problem.evaluate
        for search in (exhaustive, hierarchical):
            again = landscape(seed)
            again.evaluate = lambda shape, plain=plain, better=better: BEST if shape == better else plain(shape)
            assert search(again).shape == better


def test_a_budget_that_nothing_keeps_names_the_nearest():
    problem = landscape(1)
    limit = Limit("decode", 1e-4)
    problem.budget = Budget(problem.budget.points, (limit,))
    costs = {limit: Prediction(0.0141, 0.014, 0.0142)}
    problem.predict = lambda choice: costs
    for search in (exhaustive, hierarchical):
        with pytest.raises(BudgetError, match=r"no shape keeps torch:fp32 decode<=0.1ms: the nearest, .*14.1ms"):
            search(problem)


def test_without_an_engine_to_measure_predictions_decide():
    problem = landscape(9, spread=0.1, measurable=False)
    chosen = exhaustive(problem)
    (cost,) = problem.predict(chosen).values()
    assert cost.value <= problem.budget.limits[0].most


def test_where_more_is_better_the_searchers_look_for_the_most():
    for search in (exhaustive, hierarchical):
        problem, opposite = landscape(5), landscape(5)
        plain = problem.evaluate
        opposite.evaluate = lambda shape, plain=plain: Quality(-plain(shape).value, 0.0, 0.0)
        opposite.larger_is_better = True
        assert search(opposite) == search(problem)
