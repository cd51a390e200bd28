"""Before anything is selected or trained: the profile that a budget needs, and whether any shape can keep it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.asked import prompts_of
from amoeba_plugin.deployment.profiling.cost_model import cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile, config_digest
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.problem import Choice, possible_within
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.shape import SubnetShape


def profile_for(budget: Budget, subject: Subject, path: Path, name: str, progress: bool = True) -> Profile:
    """Return a profile that knows a budget's flows, at prompts as long as the budget's; what is missing is measured.

    Args:
        budget: Of which the flows are needed.
        subject: The model and its space, of which a quarter is measured.
        path: Of the profile; made, or extended.
        name: Of the model, for people.
        progress: Show a progress bar.

    Raises:
        ArtifactError: If the file is a profile of another model or machine, or none.
        DeploymentError: If the engine is missing or fails, or the budget's prompts do not fit the model.
        PluginError: If nobody registered the flow.
    """
    flows = {point: flow for flow, point in (point_named(str(point)) for point in budget.points)}
    if path.exists():
        known = require_of(Profile.load(path), path, subject)
        for point, flow in flows.items():
            if flow.runs_elastic(point.scheme) and str(point) in known.flows:
                known.flows[str(point)].require_adapted(subject.adapted_by, path)
        if knows(known, budget):
            return known
    how = Measuring()
    lengths = {limit.tokens for limit in budget.limits if limit.tokens} | set(prompts_of([], subject, how.decoded))
    rounds = 1 if all(limit.kind == "file" for limit in budget.limits) else how.rounds  # bytes are always the same
    return profile_model(subject, flows, path, Measuring(tuple(sorted(lengths)), rounds=rounds), name, progress)


def knows(profile: Profile, budget: Budget) -> bool:
    """Tell whether a profile has a budget's flows, at prompts as long as the budget's."""
    flows = [profile.flows.get(str(point)) for point in budget.points]
    return all(flow is not None and flow.longest >= max(limit.tokens for limit in budget.limits) for flow in flows)


def require_of(profile: Profile, path: Path, subject: Subject) -> Profile:
    """Return a profile of a subject's model.

    Raises:
        ArtifactError: If it is of another.
    """
    if profile.digest != config_digest(subject.config):
        raise ArtifactError(
            f"{path} is a profile of another model, {profile.model}; name another file, or let `amoeba profile` make it"
        )
    return profile


def require_possible(budget: Budget, profile: Profile, works: Mapping[SubnetShape, Work]) -> list[SubnetShape]:
    """Return the shapes that may keep a budget at one of its points, in the order given.

    Args:
        budget: To be kept.
        profile: That knows its flows.
        works: Sizes of all shapes there will be.

    Raises:
        BudgetError: If none does, with the nearest and what it takes.
    """
    models = {point: cost_models(profile.flows[str(point)]) for point in budget.points}
    costs = {
        Choice(shape, point): {limit: models[point][limit.kind].predict(work, limit.tokens) for limit in budget.limits}
        for shape, work in works.items()
        for point in budget.points
    }
    return list(dict.fromkeys(choice.shape for choice in possible_within(budget, costs)))
