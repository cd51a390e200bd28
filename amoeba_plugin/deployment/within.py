"""From a budget to what an engine runs: what is missing of the profile, the search, and the best shape deployed."""

from __future__ import annotations

from pathlib import Path

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.deploy import Deployed, deploy_shape, require_output
from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.search.preflight import profile_for
from amoeba_plugin.deployment.search.run import search_shapes


def deploy_within(
    elastic: Path, budget: str, asked: Asked, profile: Path, output: Path, base: str | None = None
) -> tuple[Frontier, Deployed]:
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
        AmoebaError: As :func:`profile_for`, :func:`search_shapes` and :func:`deploy_shape`.
    """
    limits = Budget.parse(budget)
    require_output(output, elastic)
    if not asked.foreign:
        profile_for(limits, subject_of(str(elastic), None, [], [], base), profile, str(elastic))
    found = search_shapes(elastic, profile, budget, asked, base)
    return found, deploy_shape(elastic, found.chosen, found.flow, output, base)
