"""From a budget to what an engine runs: what is missing of the profile, the search, and the best shape deployed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.deploy import Deployed, deploy_shape, require_output
from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.frontier import Candidate, Frontier
from amoeba_plugin.deployment.search.preflight import profile_for
from amoeba_plugin.deployment.search.run import search_shapes
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.runtime.documents import Part

MOST_TRIED = 3  # choices that are deployed where the one before is refused by its engine


class Skipped(Part):
    """A choice that was better and is not taken, and why."""

    shape: str
    flow: str
    why: str


@dataclass(frozen=True)
class Best:
    """The best choice of a search that its engine takes.

    Attributes:
        choice: Its shape, flow and costs.
        deployed: What was written.
        skipped: Better ones that their engines refused.
    """

    choice: Candidate
    deployed: Deployed
    skipped: list[Skipped]


def deploy_best(elastic: Path, found: Frontier, output: Path, base: str | None = None) -> Best:
    """Deploy the best choice within the budget, or the next best where its engine refuses it.

    Args:
        elastic: The checkpoint.
        found: By a search in it.
        output: New or empty.
        base: Where the base model is now, if it moved.

    Raises:
        AmoebaError: As :func:`deploy_shape`; a DeploymentError where the three best are refused.
    """
    skipped: list[Skipped] = []
    for each in found.within[:MOST_TRIED]:
        try:
            return Best(each, deploy_shape(elastic, each.shape, each.flow, output, base), skipped)
        except DeploymentError as error:
            skipped.append(Skipped(shape=each.shape, flow=each.flow, why=str(error)))
    raise DeploymentError(
        f"none of the best choices within {found.budget} can be deployed: {skipped[0].why}. The elastic checkpoint "
        f"is in {elastic}: deploy another shape of it, or at another scheme"
    )


def deploy_within(
    elastic: Path, budget: str, asked: Asked, profile: Path, output: Path, base: str | None = None
) -> tuple[Frontier, Best]:
    """Deploy the best shape of an elastic checkpoint within a budget.

    Args:
        elastic: The checkpoint.
        budget: As it is written.
        asked: How to search.
        profile: What shapes cost; made, or extended, where it does not know the budget's engine.
        output: New or empty.
        base: Where the base model is now, if it moved.

    Returns:
        What the search found, and what was deployed.

    Raises:
        AmoebaError: As :func:`profile_for`, :func:`search_shapes` and :func:`deploy_best`.
    """
    limits = Budget.parse(budget)
    require_output(output, elastic)
    if not asked.foreign:
        profile_for(limits, subject_of(str(elastic), None, [], [], base), profile, str(elastic))
    found = search_shapes(elastic, profile, budget, asked, base)
    return found, deploy_best(elastic, found, output, base)
