"""A search on an elastic checkpoint: costs from its profile, quality from running it at its shapes."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import CostModel, cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, measure_shapes
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.evaluators import Judge
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.search.preflight import knows, require_of
from amoeba_plugin.deployment.search.problem import Costs, Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.deployment.search.registry import evaluator_named, searcher_named
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError, BudgetError
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.shape import SubnetShape

__all__ = ["Asked", "search_elastic", "search_shapes"]

ROUNDS = 3  # processes that a shape is run in whose interval straddles the budget


def search_shapes(
    elastic: Path, profile: Path, budget: str, asked: Asked, base: str | None = None, progress: bool = True
) -> Frontier:
    """Find the best shape of an elastic checkpoint within a budget.

    Args:
        elastic: The checkpoint.
        profile: What its shapes cost.
        budget: As it is written.
        asked: How to search.
        base: Where the base model is now, if it moved.
        progress: Show how many shapes were evaluated.

    Raises:
        ArtifactError: If the profile is of another model, of shapes of other sizes, or lacks the flow.
        BudgetError: If the budget is none, or no shape keeps it.
        DataError: If the text or the questions cannot be read.
        PluginError: If nobody registered the searcher or the evaluator.
    """
    limits = Budget.parse(budget)
    searcher_named(asked.searcher), evaluator_named(asked.evaluator)  # before the model loads
    point_named(str(limits.point))
    Profile.load(profile, asked.foreign)
    live, _ = load_elastic(elastic, base)
    return search_elastic(live, profile, limits, asked, progress)


def search_elastic(
    live: ElasticModel, profile: Path, limits: Budget, asked: Asked, progress: bool = True, judge: Judge | None = None
) -> Frontier:
    """Find the best shape of a live elastic model within a budget; errors are those of :func:`search_shapes`.

    A judge, where one is given, takes the place of the evaluator that was asked for.
    """
    search, known = searcher_named(asked.searcher), Profile.load(profile, asked.foreign)
    subject = Subject.of(live.config, live.space, live.strategy)
    flow = _flow_profile(known, profile, limits, subject)
    if judge is None:
        judge = evaluator_named(asked.evaluator)(live, load_tokenizer(str(live.config.name_or_path)), asked)
    costs = _KnownCosts(limits, subject, known, profile, flow)
    with tqdm(desc="search", unit="shape", disable=not progress, leave=False) as bar:

        def evaluate(shape: SubnetShape) -> Quality:
            bar.set_postfix_str(f"judging {shape}")
            bar.update()
            return judge.judge(shape)

        def measure(shape: SubnetShape) -> Costs:
            bar.set_postfix_str(f"running {shape}")
            return costs.measure(shape)

        can_measure = asked.measure and not asked.foreign
        problem = Problem(
            live.space, limits, costs.predict, evaluate, measure if can_measure else None, judge.larger_is_better
        )
        chosen = search(problem)
    return Frontier.of(problem, asked, judge.unit, chosen)


class _KnownCosts:
    """Costs of shapes by a profile, which measuring adds to."""

    def __init__(self, budget: Budget, subject: Subject, profile: Profile, path: Path, flow: FlowProfile) -> None:
        self._budget, self._subject, self._profile, self._path, self._flow = budget, subject, profile, path, flow
        self._models: dict[str, CostModel] = cost_models(flow)

    def predict(self, shape: SubnetShape) -> Costs:
        """Return what is known of a shape's costs, by limit."""
        work = Work.of(self._subject.sizes(shape))
        return {limit: self._models[limit.kind].predict(work, limit.tokens) for limit in self._budget.limits}

    def measure(self, shape: SubnetShape) -> Costs:
        """Run a shape now, with the prompts that the budget names."""
        flow, point = point_named(str(self._budget.point))
        asked = {limit.tokens for limit in self._budget.limits if limit.tokens}
        known = {tokens for cost in self._flow.shapes.values() for each in cost.rounds for tokens in each.prefill}
        how = Measuring(tuple(sorted(asked | known)), self._flow.decoded, ROUNDS, self._flow.threads, self._flow.batch)
        measure_shapes(self._subject, {point: flow}, self._profile, self._path, how, [shape])
        self._models = cost_models(self._flow)
        return self.predict(shape)


def _flow_profile(profile: Profile, path: Path, budget: Budget, subject: Subject) -> FlowProfile:
    """Return what is known of a budget's flow, of this model; its shapes may have been of other sizes."""
    flow = require_of(profile, path, subject).flows.get(str(budget.point))
    if flow is None:
        raise ArtifactError(
            f"{path} knows nothing of {budget.point}, only of {', '.join(profile.flows)}; add it: amoeba profile "
            f"ELASTIC --flow {budget.point} -o {path}"
        )
    asked = max(limit.tokens for limit in budget.limits)
    if not knows(profile, budget):
        raise BudgetError(
            f"the budget is about prompts of {asked} tokens, and {path} has none longer than {flow.longest}; profile "
            f"with --prompts {asked}, to another file"
        )
    return flow
