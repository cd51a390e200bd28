"""What a search found: every shape that was tried, how good it is and what it costs, and the best within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.problem import Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.shape import SubnetShape

VERSION: Literal[1] = 1


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # an interval nobody knows has no end


class Cost(_Document):
    """A cost, in seconds or bytes, between the ends of its interval."""

    value: float
    low: float
    high: float
    measured: bool


class Interval(_Document):
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


class RunnerUp(_Document):
    """The second best within the budget.

    Attributes:
        shape: Its name.
        behind: By how much it is worse than what was chosen, judged on the same rows or questions.
    """

    shape: str
    behind: Interval

    @property
    def is_told_apart(self) -> bool:
        """Whether it is surely worse."""
        return self.behind.low > 0


class Candidate(_Document):
    """A shape that was tried.

    Attributes:
        shape: Its name.
        quality: How good it is, in the evaluator's unit.
        costs: By what the budget limits: ``prefill[256]``.
        keeps: Whether it keeps the budget, as far as that is known.
        dominated: Whether another one is better and costs no more.
    """

    shape: str
    quality: Interval
    costs: dict[str, Cost]
    keeps: bool
    dominated: bool = False


class Frontier(_Document):
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
        measured: How many were run because their interval straddled the budget.
        chosen: The best that keeps the budget.
        runner_up: The second best; ``None``: no other that keeps it was evaluated.
        candidates: All that were evaluated, the best first.
    """

    version: Literal[1] = VERSION
    budget: str
    searcher: str
    evaluator: str = "loss"
    unit: str
    larger_is_better: bool = False
    shapes: int
    evaluated: int
    measured: int
    chosen: str
    runner_up: RunnerUp | None = None
    candidates: list[Candidate]

    @classmethod
    def of(cls, problem: Problem, asked: Asked, unit: str, chosen: SubnetShape) -> Frontier:
        """Return what a search knows of its problem."""
        order = sorted(problem.qualities, key=problem.loss)
        found: list[Candidate] = []
        for shape in order:
            costs = {
                limit.name: Cost(value=cost.value, low=cost.low, high=cost.high, measured=cost.measured)
                for limit, cost in problem.costs(shape).items()
            }
            keeps = all(costs[limit.name].value <= limit.most for limit in problem.budget.limits)
            dominated = any(
                all(better.costs[name].value <= cost.value for name, cost in costs.items()) for better in found
            )
            quality = Interval.of(problem.qualities[shape])
            found.append(Candidate(shape=str(shape), quality=quality, costs=costs, keeps=keeps, dominated=dominated))
        kept = [shape for shape, each in zip(order, found, strict=True) if each.keeps and shape != chosen]
        return cls(
            budget=str(problem.budget), searcher=asked.searcher, evaluator=asked.evaluator, unit=unit,
            larger_is_better=problem.larger_is_better, shapes=len(problem.space), evaluated=len(found),
            measured=len(problem.measured), chosen=str(chosen), candidates=found,
            runner_up=_runner_up(problem, chosen, kept[0]) if kept else None,
        )  # fmt: skip

    @property
    def point(self) -> str:
        """The engine and scheme of the budget."""
        return str(Budget.parse(self.budget).point)

    def command(self, elastic: Path) -> str:
        """Return what deploys the shape that was chosen."""
        point = Budget.parse(self.budget).point
        return f"amoeba deploy {elastic} --shape {self.chosen} --flow {point} -o OUT"

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Frontier:
        """Read it.

        Raises:
            ArtifactError: If it is none, damaged, or of another version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{path} is no result of a search, damaged, or of another version") from error


def _runner_up(problem: Problem, chosen: SubnetShape, second: SubnetShape) -> RunnerUp:
    better, worse = problem.qualities[chosen], problem.qualities[second]
    behind = better.minus(worse) if problem.larger_is_better else worse.minus(better)
    return RunnerUp(shape=str(second), behind=Interval.of(behind))
