"""What a search found: every choice that was tried, its quality and costs, and the best one within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.finalists import Settled
from amoeba_plugin.deployment.search.problem import Choice, Problem, by_quality
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.runtime.documents import Document, Part

ELASTIC = "ELASTIC"  # in a command, for a checkpoint whose place nobody said


class Cost(Part):
    """A cost, in seconds or bytes, between the ends of its interval."""

    value: float
    low: float
    high: float
    measured: bool


class Interval(Part):
    """A value, in the evaluator's unit, between the ends of its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, quality: Quality) -> Interval:
        """Return a quality's."""
        return cls(value=quality.value, low=quality.low, high=quality.high)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Candidate(Part):
    """A choice whose shape was tried.

    Attributes:
        shape: Its name.
        flow: And scheme.
        quality: How good it is, in the evaluator's unit, with what the scheme does to it.
        behind: By how much it is worse than what was chosen, judged on the same rows or questions.
        harm: What the scheme does to this very shape, in its engine; ``None``: not measured, or nothing. ``quality``
            has then what it did to the first shape that was measured at it, if any was.
        costs: By what the budget limits: ``prefill[256]``.
        keeps: Whether it keeps the budget, as far as that is known.
        dominated: Whether another one is better and costs no more.
        deploy: The command that deploys it.
    """

    shape: str
    flow: str
    quality: Interval
    behind: Interval
    harm: Interval | None = None
    costs: dict[str, Cost]
    keeps: bool
    dominated: bool = False
    deploy: str

    @property
    def is_surely_worse(self) -> bool:
        """Whether it can be told apart from what was chosen."""
        return self.behind.low > 0


class Frontier(Document):
    """What a search found.

    Attributes:
        version: Of the document.
        budget: As it is written.
        searcher: That found it.
        evaluator: That judged shapes.
        unit: Of its values.
        larger_is_better: Whether a larger value is a better shape.
        shapes: Of the space.
        evaluated: How many of them were judged.
        measured: How many choices' costs were measured for this search.
        finalists: How many choices were measured in their engine, for what their scheme does to them.
        open: How many others could be better, if their scheme did them no harm.
        chosen: The shape of the best choice that keeps the budget.
        flow: Its flow and scheme.
        candidates: All choices whose shapes were evaluated, the best first.
    """

    what: ClassVar[str] = "a result of a search"
    version: Literal[1] = 1
    budget: str
    searcher: str
    evaluator: str
    unit: str
    larger_is_better: bool
    shapes: int
    evaluated: int
    measured: int
    finalists: int
    open: int
    chosen: str
    flow: str
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate:
        """What was chosen."""
        return next(each for each in self.candidates if (each.shape, each.flow) == (self.chosen, self.flow))

    @property
    def within(self) -> list[Candidate]:
        """Those that keep the budget, what was chosen first, then the best."""
        return [self.best, *(each for each in self.candidates if each.keeps and each != self.best)]

    @property
    def runner_up(self) -> Candidate | None:
        """The second best within the budget; ``None``: no other that keeps it was evaluated."""
        return next(iter(self.within[1:]), None)

    @classmethod
    def of(cls, problem: Problem, asked: Asked, unit: str, settled: Settled, elastic: str) -> Frontier:
        """Return what a search knows of its problem."""
        chosen = settled.finalists[0]
        order = by_quality(problem, [each for each in problem.choices() if each.shape in problem.qualities])
        found: list[Candidate] = []
        for choice in order:
            found.append(_candidate(problem, choice, chosen, found, elastic))
        return cls(
            budget=str(problem.budget), searcher=asked.searcher, evaluator=asked.evaluator, unit=unit,
            larger_is_better=problem.larger_is_better, shapes=len(problem.space), evaluated=len(problem.qualities),
            measured=len(problem.measured), finalists=len(problem.harms), open=settled.open,
            chosen=str(chosen.shape), flow=str(chosen.point), candidates=found,
        )  # fmt: skip

    def command(self, elastic: Path) -> str:
        """Return what deploys the shape that was chosen."""
        return _command(elastic, self.chosen, self.flow)


def _candidate(
    problem: Problem, choice: Choice, chosen: Choice, better: Sequence[Candidate], elastic: str
) -> Candidate:
    costs = {
        limit.name: Cost(value=cost.value, low=cost.low, high=cost.high, measured=cost.measured)
        for limit, cost in problem.costs(choice).items()
    }
    harm = problem.harms.get(choice)
    dominated = any(all(each.costs[name].value <= cost.value for name, cost in costs.items()) for each in better)
    return Candidate(
        shape=str(choice.shape), flow=str(choice.point), quality=Interval.of(problem.quality(choice)),
        behind=_behind(problem, chosen, choice),
        harm=None if harm is None else Interval.of(harm), costs=costs, keeps=problem.seems_to_keep(choice),
        dominated=dominated, deploy=_command(elastic, str(choice.shape), str(choice.point)),
    )  # fmt: skip


def _behind(problem: Problem, chosen: Choice, other: Choice) -> Interval:
    if chosen == other:
        return Interval(value=0.0, low=0.0, high=0.0)
    better, worse = problem.quality(chosen), problem.quality(other)
    return Interval.of(better.minus(worse) if problem.larger_is_better else worse.minus(better))


def _command(elastic: Path | str, shape: str, flow: str) -> str:
    engine, point = point_named(flow)
    if engine.runs_elastic(point.scheme):
        return f"nothing to deploy: {flow} runs {elastic} at {shape} as it is"
    return f"amoeba deploy {elastic} --shape {shape} --flow {flow} -o OUT"
