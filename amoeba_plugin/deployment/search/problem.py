"""What a search is about: a space, what choices of it cost, how good they are; and what it found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amoeba_plugin.deployment.budget import Budget, Limit, Verdict
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.errors import BudgetError
from amoeba_plugin.shape import ShapeSpace, SubnetShape

Costs = Mapping[Limit, Prediction]
AT_ONCE = 3  # choices that are measured where one has to be: starting processes takes longest


@dataclass(frozen=True)
class Choice:
    """A shape in a flow at a scheme: what a search chooses."""

    shape: SubnetShape
    point: Point

    def __str__(self) -> str:
        return f"{self.shape} at {self.point}"


@dataclass
class Problem:
    """A budget, and a space to search for the best choice that keeps it.

    Attributes:
        space: Of shapes.
        budget: That must be kept, with the points that may be chosen.
        predict: Returns what a choice costs, by every limit of the budget.
        evaluate: Returns how good a shape is before any scheme; takes long, and is asked once for a shape.
        measure: Returns what choices cost, measured now, together in less time than one by one; ``None``: predictions
            are all there is.
        larger_is_better: Whether a larger value is a better shape; its loss is the negative then.
        harm: Returns what a scheme adds to the value of a shape, measured in the engine; ``None``: nobody can tell.
        exact: Points whose schemes leave values as they are.
        trials: How many choices a searcher tries that could go on for ever.
        storage: File in which such a one keeps its trials, so that it can go on; ``None``: nowhere.
        name: Of the problem, the same for the same model, judged on the same, within the same budget.
        qualities: Of the shapes that were evaluated.
        harms: Of the choices that were measured in their engine.
        measured: Costs of the choices that were measured.
    """

    space: ShapeSpace
    budget: Budget
    predict: Callable[[Choice], Costs]
    evaluate: Callable[[SubnetShape], Quality]
    measure: Callable[[Sequence[Choice]], Mapping[Choice, Costs]] | None = None
    larger_is_better: bool = False
    harm: Callable[[Choice], Quality] | None = None
    exact: Collection[Point] = ()
    trials: int = 100
    storage: Path | None = None
    name: str = "search"
    qualities: dict[SubnetShape, Quality] = field(default_factory=dict)
    harms: dict[Choice, Quality] = field(default_factory=dict)
    measured: dict[Choice, Costs] = field(default_factory=dict)

    def loss(self, choice: Choice) -> float:
        """Return a number that is the less, the better a choice is, as far as that is known (:meth:`quality`)."""
        return self.loss_of(self.quality(choice))

    def loss_of(self, quality: Quality) -> float:
        """Return a number that is the less, the better a quality is."""
        return -quality.value if self.larger_is_better else quality.value

    def unharmed(self, shape: SubnetShape) -> Quality:
        """Return how good a shape is before any scheme."""
        if shape not in self.qualities:
            self.qualities[shape] = self.evaluate(shape)
        return self.qualities[shape]

    def quality(self, choice: Choice) -> Quality:
        """Return how good a choice is: with its scheme's harm, or that of the first shape measured at its point."""
        harm = self.harms.get(choice) or next(
            (harm for other, harm in self.harms.items() if other.point == choice.point), None
        )
        return self.unharmed(choice.shape) if harm is None else self.unharmed(choice.shape).plus(harm)

    def is_final(self, choice: Choice) -> bool:
        """Tell whether all is known of how good a choice is: its scheme harms nothing, or was measured."""
        return self.harm is None or choice.point in self.exact or choice in self.harms

    def measure_harm(self, choice: Choice) -> None:
        """Measure what a scheme does to a shape, where that is not known."""
        if not self.is_final(choice):
            assert self.harm is not None
            self.harms[choice] = self.harm(choice)

    def costs(self, choice: Choice) -> Costs:
        """Return what is known of a choice's costs."""
        return self.measured.get(choice) or self.predict(choice)

    def verdict(self, choice: Choice) -> Verdict:
        """Tell whether a choice keeps the budget, as far as that is known."""
        return self.budget.verdict(self.costs(choice))

    def kept(self, choices: Sequence[Choice]) -> list[Choice]:
        """Return those of some choices that keep the budget; intervals that straddle it are measured together."""
        self._measure([choice for choice in choices if self.verdict(choice) is Verdict.UNSURE])
        return [choice for choice in choices if self.seems_to_keep(choice)]

    def keeps(self, choice: Choice, following: Sequence[Choice] = ()) -> bool:
        """Tell whether a choice keeps the budget; where its interval straddles it, by measuring.

        Args:
            choice: That is asked about.
            following: What is asked about next, and is measured with it as far as it must be.
        """
        if self.verdict(choice) is Verdict.UNSURE:
            others = [other for other in following if self.verdict(other) is Verdict.UNSURE]
            self._measure([choice, *others[: AT_ONCE - 1]])
        return self.seems_to_keep(choice)

    def confirm(self, choice: Choice, following: Sequence[Choice] = ()) -> bool:
        """Tell whether a choice keeps the budget, by measuring in any case; ``following`` as of :meth:`keeps`."""
        if not self._is_measured(choice):
            others = [other for other in following if not self._is_measured(other)]
            self._measure([choice, *others[: AT_ONCE - 1]])
        return self.seems_to_keep(choice)

    def seems_to_keep(self, choice: Choice) -> bool:
        """Tell whether a choice keeps the budget by what is known, intervals aside."""
        costs = self.costs(choice)
        return all(costs[limit].value <= limit.most for limit in self.budget.limits)

    def possible(self) -> list[Choice]:
        """Return the choices that may keep the budget, the largest shapes first.

        Raises:
            BudgetError: If none does, with the choice that is nearest.
        """
        return possible_within(self.budget, {choice: self.costs(choice) for choice in self.choices()})

    def choices(self) -> list[Choice]:
        """Return all of them, the largest shapes first."""
        return [Choice(shape, point) for shape in self.space for point in self.budget.points]

    def _is_measured(self, choice: Choice) -> bool:
        return all(cost.measured for cost in self.costs(choice).values())

    def _measure(self, choices: Sequence[Choice]) -> None:
        if self.measure is not None and choices:
            self.measured |= self.measure(choices)


def possible_within(budget: Budget, costs: Mapping[Choice, Costs]) -> list[Choice]:
    """Return the choices that may keep a budget, in the order given.

    Raises:
        BudgetError: If none does, with the choice that is nearest.
    """
    found = [choice for choice in costs if budget.verdict(costs[choice]) is not Verdict.EXCEEDS]
    if not found:
        raise BudgetError(f"no shape keeps {budget}: {_nearest(budget, costs)}; allow more, or smaller shapes")
    return found


def _nearest(budget: Budget, costs: Mapping[Choice, Costs]) -> str:
    """Return what the choice that exceeds a budget least takes."""

    def excess(choice: Choice) -> float:
        return max(costs[choice][limit].value / limit.most for limit in budget.limits)

    choice = min(costs, key=excess)
    took = ", ".join(f"{limit.name} {limit.in_unit(costs[choice][limit].value)}" for limit in budget.limits)
    return f"the nearest, {choice if len(budget.points) > 1 else choice.shape}, takes {took}"


def best_kept(problem: Problem, tried: Sequence[Choice]) -> Choice:
    """Return the best of the choices tried that keeps the budget; equally good ones by size, the smallest.

    Raises:
        BudgetError: If none does, once it is measured where that can be.
    """
    ordered = by_quality(problem, tried)
    for place, choice in enumerate(ordered, 1):
        if problem.keeps(choice, ordered[place:]):
            return choice
    nearest = _nearest(problem.budget, {choice: problem.costs(choice) for choice in problem.choices()})
    how = " when it is measured" if problem.measure is not None else ", as it was predicted"
    raise BudgetError(f"no shape that was tried keeps {problem.budget}{how}: {nearest}")


def by_quality(problem: Problem, tried: Collection[Choice]) -> list[Choice]:
    """Return choices, the best first; equally good ones by size, the smallest first."""
    places = {choice: place for place, choice in enumerate(problem.choices())}
    return sorted(tried, key=lambda each: (problem.loss(each), -places[each]))
