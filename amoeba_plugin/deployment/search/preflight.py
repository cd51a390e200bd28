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
    """Return a profile that knows a budget's flow, at prompts as long as the budget's; what is missing is measured.

    Args:
        budget: Of which the flow is needed.
        subject: The model and its space, of which a quarter is measured.
        path: Of the profile; made, or extended.
        name: Of the model, for people.
        progress: Show a progress bar.

    Raises:
        ArtifactError: If the file is a profile of another model or machine, or none.
        DeploymentError: If the engine is missing or fails, or the budget's prompts do not fit the model.
        PluginError: If nobody registered the flow.
    """
    flow, point = point_named(str(budget.point))
    if path.exists() and knows(Profile.load(path), budget):
        return require_of(Profile.load(path), path, subject)
    how = Measuring()
    lengths = {limit.tokens for limit in budget.limits if limit.tokens} | set(prompts_of([], subject, how.decoded))
    return profile_model(subject, {point: flow}, path, Measuring(tuple(sorted(lengths))), name, progress)


def knows(profile: Profile, budget: Budget) -> bool:
    """Tell whether a profile has a budget's flow, at prompts as long as the budget's."""
    flow = profile.flows.get(str(budget.point))
    return flow is not None and flow.longest >= max(limit.tokens for limit in budget.limits)


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
    """Return the shapes that may keep a budget, in the order given.

    Args:
        budget: To be kept.
        profile: That knows its flow.
        works: Sizes of all shapes there will be.

    Raises:
        BudgetError: If none does, with the nearest and what it takes.
    """
    models = cost_models(profile.flows[str(budget.point)])
    costs = {
        shape: {limit: models[limit.kind].predict(work, limit.tokens) for limit in budget.limits}
        for shape, work in works.items()
    }
    possible = [shape for shape in works if budget.verdict(costs[shape]) is not Verdict.EXCEEDS]
    if not possible:
        nearest = min(works, key=lambda shape: max(costs[shape][limit].value / limit.most for limit in budget.limits))
        took = ", ".join(f"{limit.name} {limit.in_unit(costs[nearest][limit].value)}" for limit in budget.limits)
        raise BudgetError(
            f"no shape keeps {budget}: {nearest} is nearest and takes {took}; allow more, or smaller shapes"
        )
    return possible
