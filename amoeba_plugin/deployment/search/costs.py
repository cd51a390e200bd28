"""What choices cost: by a profile, which measuring adds to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.cost_model import CostModel, cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, measure_shapes
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.preflight import require_of
from amoeba_plugin.deployment.search.problem import Choice, Costs
from amoeba_plugin.errors import ArtifactError, BudgetError
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.shape import SubnetShape

PATIENCE = 600.0  # seconds, for another process that measures
ROUNDS = 3  # processes that a choice is run in, where it is measured for a search


class KnownCosts:
    """Costs of a model's choices within one budget.

    Args:
        budget: Its points are known to the profile.
        subject: The model.
        profile: What was measured.
        path: Of the profile, where what is measured now is added.

    Raises:
        ArtifactError: If the profile is of another model, or lacks a point.
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
        return {limit: models[limit.kind].predict(work, limit.tokens) for limit in self._budget.limits}

    def measure(self, choices: Sequence[Choice]) -> dict[Choice, Costs]:
        """Run choices now, with the prompts that the budget names; those of one point in the same processes."""
        for point in dict.fromkeys(choice.point for choice in choices):
            self._measure(point, [choice.shape for choice in choices if choice.point == point])
        return {choice: self.predict(choice) for choice in choices}

    def _measure(self, point: Point, shapes: Sequence[SubnetShape]) -> None:
        flow, _ = point_named(str(point))
        of = self._flows[point]
        asked = {limit.tokens for limit in self._budget.limits if limit.tokens}
        lengths = {tokens for cost in of.shapes.values() for each in cost.rounds for tokens in each.prefill}
        how = Measuring(tuple(sorted(asked | lengths)), of.decoded, ROUNDS, of.threads, of.batch)
        with owning(self._path, patience=PATIENCE):  # another process may search by it too
            for name, known in Profile.load(self._path).flows.items():
                self._profile.flows[name] = known
            measure_shapes(self._subject, {point: flow}, self._profile, self._path, how, shapes)
        self._flows[point] = self._profile.flows[str(point)]
        self._models[point] = cost_models(self._flows[point])


def _flow_profiles(profile: Profile, path: Path, budget: Budget, subject: Subject) -> dict[Point, FlowProfile]:
    """Return what is known of a budget's points, of this model; its shapes may have been of other sizes."""
    known = require_of(profile, path, subject).flows
    missing = [str(point) for point in budget.points if str(point) not in known]
    if missing:
        raise ArtifactError(
            f"{path} knows nothing of {' and '.join(missing)}, only of {', '.join(known)}; add it: amoeba "
            f"profile ELASTIC {' '.join(f'--flow {each}' for each in missing)} -o {path}"
        )
    flows = {point: known[str(point)] for point in budget.points}
    longest, asked = min(flow.longest for flow in flows.values()), max(limit.tokens for limit in budget.limits)
    if asked > longest:
        raise BudgetError(
            f"the budget is about prompts of {asked} tokens, and {path} has none longer than {longest}; profile with "
            f"--prompts {asked}, to another file"
        )
    return flows
