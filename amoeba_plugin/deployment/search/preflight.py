"""Before anything is selected or trained: the profile that a budget needs, and whether any shape can keep it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from amoeba_plugin.deployment.budget import Budget, Verdict
from amoeba_plugin.deployment.profiling.asked import prompts_of
from amoeba_plugin.deployment.profiling.cost_model import cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile, config_digest
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.errors import ArtifactError, BudgetError
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
    if path.exists() and knows(Profile.load(path), budget):
        return require_of(Profile.load(path), path, subject)
    how = Measuring()
    lengths = {limit.tokens for limit in budget.limits if limit.tokens} | set(prompts_of([], subject, how.decoded))
    flows = {point: flow for flow, point in (point_named(str(point)) for point in budget.points)}
    return profile_model(subject, flows, path, Measuring(tuple(sorted(lengths))), name, progress)


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
    costs = {}
    for point in budget.points:
        models = cost_models(profile.flows[str(point)])
        for shape, work in works.items():
            costs[shape, point] = {limit: models[limit.kind].predict(work, limit.tokens) for limit in budget.limits}
    kept = {shape for (shape, _), found in costs.items() if budget.verdict(found) is not Verdict.EXCEEDS}
    if not kept:
        nearest = min(costs, key=lambda each: max(costs[each][limit].value / limit.most for limit in budget.limits))
        took = ", ".join(f"{limit.name} {limit.in_unit(costs[nearest][limit].value)}" for limit in budget.limits)
        named = f"{nearest[0]}{f' at {nearest[1]}' if len(budget.points) > 1 else ''}"
        raise BudgetError(
            f"no shape keeps {budget}: {named} is nearest and takes {took}; allow more, or smaller shapes"
        )
    return [shape for shape in works if shape in kept]
