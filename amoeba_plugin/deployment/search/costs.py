"""What choices cost: by a profile, which measuring adds to."""

from __future__ import annotations

from pathlib import Path

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.cost_model import CostModel, cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, measure_shapes
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile, config_digest
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.problem import Choice, Costs
from amoeba_plugin.errors import ArtifactError, BudgetError

ROUNDS = 3  # processes that a choice is run in, where it is measured for a search


class KnownCosts:
    """Costs of a model's choices within one budget.

    Args:
        budget: Its points are known to the profile.
        subject: The model.
        profile: What was measured.
        path: Of the profile, where what is measured now is added.

    Raises:
        ArtifactError: If the profile is of another model, of shapes of other sizes, or lacks a point.
        BudgetError: If the budget is about longer prompts than the profile knows.
    """

    def __init__(self, budget: Budget, subject: Subject, profile: Profile, path: Path) -> None:
        self._flows = _flow_profiles(profile, path, budget, subject)
        self._budget, self._subject, self._profile, self._path = budget, subject, profile, path
        self._models: dict[Point, dict[str, CostModel]] = {
            point: cost_models(flow) for point, flow in self._flows.items()
        }

    def predict(self, choice: Choice) -> Costs:
        """Return what is known of a choice's costs, by limit."""
        work, models = Work.of(self._subject.sizes(choice.shape)), self._models[choice.point]
        return {
            limit: models[limit.kind].predict(work, limit.tokens, str(choice.shape)) for limit in self._budget.limits
        }

    def measure(self, choice: Choice) -> Costs:
        """Run a choice now, with the prompts that the budget names."""
        flow, point = point_named(str(choice.point))
        of = self._flows[point]
        asked = {limit.tokens for limit in self._budget.limits if limit.tokens}
        how = Measuring(tuple(sorted(asked | set(_lengths(of)))), of.decoded, ROUNDS, of.threads, of.batch)
        measure_shapes(self._subject, {point: flow}, self._profile, self._path, how, [choice.shape])
        self._models[point] = cost_models(of)
        return self.predict(choice)


def _lengths(flow: FlowProfile) -> list[int]:
    return sorted({tokens for cost in flow.shapes.values() for each in cost.rounds for tokens in each.prefill})


def _flow_profiles(profile: Profile, path: Path, budget: Budget, subject: Subject) -> dict[Point, FlowProfile]:
    """Return what is known of a budget's points, of this very model."""
    sizes = {str(shape): Work.of(subject.sizes(shape)) for shape in subject.space}
    if profile.digest != config_digest(subject.config) or any(profile.works.get(name) != sizes[name] for name in sizes):
        raise ArtifactError(
            f"{path} is a profile of another model, or of shapes of other sizes; `amoeba profile ELASTIC` makes one of "
            "the checkpoint's own"
        )
    missing = [str(point) for point in budget.points if str(point) not in profile.flows]
    if missing:
        raise ArtifactError(
            f"{path} knows nothing of {' and '.join(missing)}, only of {', '.join(profile.flows)}; add it: amoeba "
            f"profile ELASTIC {' '.join(f'--flow {each}' for each in missing)} -o {path}"
        )
    flows = {point: profile.flows[str(point)] for point in budget.points}
    longest = min(_lengths(flow)[-1] for flow in flows.values())
    asked = max(limit.tokens for limit in budget.limits)
    if asked > longest:
        raise BudgetError(
            f"the budget is about prompts of {asked} tokens, and {path} has none longer than {longest}; profile with "
            f"--prompts {asked}, to another file"
        )
    return flows
