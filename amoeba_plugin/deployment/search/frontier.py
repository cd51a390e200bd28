"""What a search found: every shape that was tried, with its loss and costs, and the best one within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.search.problem import Problem
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


class Candidate(_Document):
    """A shape that was tried.

    Attributes:
        shape: Its name.
        loss: On the text that shapes were judged on, nats per token.
        costs: By what the budget limits: ``prefill[256]``.
        keeps: Whether it keeps the budget, as far as that is known.
        dominated: Whether another one is better and costs no more.
    """

    shape: str
    loss: float
    costs: dict[str, Cost]
    keeps: bool
    dominated: bool = False


class Frontier(_Document):
    """What a search found.

    Attributes:
        version: Of the document.
        budget: As it is written.
        searcher: That found it.
        shapes: Of the space.
        evaluated: How many of them were judged on text.
        measured: How many were run because their interval straddled the budget.
        chosen: The best that keeps the budget.
        candidates: All that were evaluated, the best first.
    """

    version: Literal[1] = VERSION
    budget: str
    searcher: str
    shapes: int
    evaluated: int
    measured: int
    chosen: str
    candidates: list[Candidate]

    @classmethod
    def of(cls, problem: Problem, searcher: str, chosen: SubnetShape) -> Frontier:
        """Return what a search knows of its problem."""
        found: list[Candidate] = []
        for shape, loss in sorted(problem.losses.items(), key=lambda item: item[1]):
            costs = {
                limit.name: Cost(value=cost.value, low=cost.low, high=cost.high, measured=cost.measured)
                for limit, cost in problem.costs(shape).items()
            }
            keeps = all(costs[limit.name].value <= limit.most for limit in problem.budget.limits)
            dominated = any(
                all(better.costs[name].value <= cost.value for name, cost in costs.items()) for better in found
            )
            found.append(Candidate(shape=str(shape), loss=loss, costs=costs, keeps=keeps, dominated=dominated))
        return cls(
            budget=str(problem.budget), searcher=searcher, shapes=len(problem.space), evaluated=len(problem.losses),
            measured=len(problem.measured), chosen=str(chosen), candidates=found,
        )  # fmt: skip

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
