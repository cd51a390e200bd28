"""A search on an elastic checkpoint: costs from its profile, losses from running it at its shapes, on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import CostModel, cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, measure_shapes
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.search.preflight import knows, require_of
from amoeba_plugin.deployment.search.problem import Costs, Problem
from amoeba_plugin.deployment.search.registry import searcher_named
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError, BudgetError
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.selection.objectives import PerTokenLoss
from amoeba_plugin.shape import SubnetShape

SEED, ROWS_AT_ONCE = 0, 8
ROUNDS = 3  # processes that a shape is run in whose interval straddles the budget


@dataclass(frozen=True)
class Asked:
    """How a search is to be made.

    Attributes:
        searcher: Its name.
        dataset: Text that shapes are judged on.
        split: Of the data set.
        num_samples: Rows.
        max_seq_length: Tokens of a row.
        measure: Whether shapes whose predicted costs straddle the budget are run.
        foreign: Whether the profile may be of another machine, on which nothing can be measured then.
    """

    searcher: str
    dataset: str
    split: str = "train"
    num_samples: int = 32
    max_seq_length: int = 256
    measure: bool = True
    foreign: bool = False


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
        DataError: If the text cannot be read.
    """
    limits = Budget.parse(budget)
    searcher_named(asked.searcher)  # before the model loads
    point_named(str(limits.point))
    Profile.load(profile, asked.foreign)
    live, _ = load_elastic(elastic, base)
    return search_elastic(live, profile, limits, asked, progress)


def search_elastic(
    live: ElasticModel, profile: Path, limits: Budget, asked: Asked, progress: bool = True,
    batches: list[Batch] | None = None,
) -> Frontier:  # fmt: skip
    """Find the best shape of a live elastic model within a budget; errors are those of :func:`search_shapes`.

    Batches, where they are given, are what shapes are judged on, in place of a data set.
    """
    search, known = searcher_named(asked.searcher), Profile.load(profile, asked.foreign)
    subject = Subject.of(live.config, live.space, live.strategy)
    flow = _flow_profile(known, profile, limits, subject)
    judged = _held_out(live, asked) if batches is None else batches
    costs = _KnownCosts(limits, subject, known, profile, flow)
    with tqdm(desc="search", unit="shape", disable=not progress, leave=False) as bar:

        def evaluate(shape: SubnetShape) -> float:
            bar.set_postfix_str(f"judging {shape}")
            bar.update()
            return _loss(live, shape, judged)

        def measure(shape: SubnetShape) -> Costs:
            bar.set_postfix_str(f"running {shape}")
            return costs.measure(shape)

        can_measure = asked.measure and not asked.foreign
        problem = Problem(live.space, limits, costs.predict, evaluate, measure if can_measure else None)
        chosen = search(problem)
    return Frontier.of(problem, asked.searcher, chosen)


def _held_out(live: ElasticModel, asked: Asked) -> list[Batch]:
    return load_batches(
        asked.dataset, load_tokenizer(str(live.config.name_or_path)), split=asked.split, num_samples=asked.num_samples,
        max_seq_length=asked.max_seq_length, batch_size=ROWS_AT_ONCE, vocab_size=live.config.vocab_size, seed=SEED,
    )  # fmt: skip


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


@torch.no_grad()
def _loss(elastic: ElasticModel, shape: SubnetShape, batches: list[Batch]) -> float:
    with elastic.active(shape) as model, evaluating(model):
        return float(PerTokenLoss().measure(model, batches).value)
