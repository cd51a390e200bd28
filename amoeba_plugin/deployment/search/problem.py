"""What a search is about: a space, what shapes cost, how good they are; and what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from amoeba_plugin.deployment.budget import Budget, Limit, Verdict
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.errors import BudgetError
from amoeba_plugin.shape import ShapeSpace, SubnetShape

Costs = Mapping[Limit, Prediction]


@dataclass
class Problem:
    """A budget, and a space to search for the best shape that keeps it.

    Attributes:
        space: Of shapes.
        budget: That must be kept.
        predict: Returns what a shape costs, by every limit of the budget.
        evaluate: Returns how good a shape is; takes long, and is asked once for a shape.
        measure: Returns what a shape costs, measured now; ``None``: predictions are all there is.
        larger_is_better: Whether a larger value is a better shape; its loss is the negative then.
    """

    space: ShapeSpace
    budget: Budget
    predict: Callable[[SubnetShape], Costs]
    evaluate: Callable[[SubnetShape], Quality]
    measure: Callable[[SubnetShape], Costs] | None = None
    larger_is_better: bool = False
    qualities: dict[SubnetShape, Quality] = field(default_factory=dict)
    measured: dict[SubnetShape, Costs] = field(default_factory=dict)

    def loss(self, shape: SubnetShape) -> float:
        """Return a number that is the less, the better a shape is."""
        if shape not in self.qualities:
            self.qualities[shape] = self.evaluate(shape)
        value = self.qualities[shape].value
        return -value if self.larger_is_better else value

    def costs(self, shape: SubnetShape) -> Costs:
        """Return what is known of a shape's costs."""
        return self.measured.get(shape) or self.predict(shape)

    def verdict(self, shape: SubnetShape) -> Verdict:
        """Tell whether a shape keeps the budget, as far as that is known."""
        return self.budget.verdict(self.costs(shape))

    def keeps(self, shape: SubnetShape) -> bool:
        """Tell whether a shape keeps the budget; where its interval straddles it, by measuring."""
        verdict = self.verdict(shape)
        if verdict is Verdict.UNSURE and self.measure is not None:
            self.measured[shape] = self.measure(shape)
            verdict = self.verdict(shape)
        if verdict is Verdict.UNSURE:
            costs = self.costs(shape)
            return all(costs[limit].value <= limit.most for limit in self.budget.limits)
        return verdict is Verdict.KEEPS

    def possible(self) -> list[SubnetShape]:
        """Return the shapes that may keep the budget, the largest first.

        Raises:
            BudgetError: If none does, with the shape that is nearest.
        """
        found = [shape for shape in self.space if self.verdict(shape) is not Verdict.EXCEEDS]
        if not found:
            raise BudgetError(f"no shape of {self.space} keeps {self.budget}: {self.nearest()}")
        return found

    def nearest(self) -> str:
        """Return what the shape that exceeds the budget least takes."""

        def excess(shape: SubnetShape) -> float:
            costs = self.costs(shape)
            return max(costs[limit].value / limit.most for limit in self.budget.limits)

        shape = min(self.space, key=excess)
        costs = self.costs(shape)
        took = ", ".join(f"{limit.name} {limit.in_unit(costs[limit].value)}" for limit in self.budget.limits)
        return f"the nearest, {shape}, takes {took}"


def best_kept(problem: Problem, tried: Sequence[SubnetShape]) -> SubnetShape:
    """Return the best of the shapes tried that keeps the budget; equally good ones by size, the smallest.

    Raises:
        BudgetError: If none does once it is measured.
    """
    space = list(problem.space)
    for shape in sorted(tried, key=lambda each: (problem.loss(each), -space.index(each))):
        if problem.keeps(shape):
            return shape
    raise BudgetError(f"no shape that was tried keeps {problem.budget} when it is measured: {problem.nearest()}")
