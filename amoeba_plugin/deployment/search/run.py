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
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile, config_digest
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.frontier import Frontier
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
    limits, search = Budget.parse(budget), searcher_named(asked.searcher)
    point_named(str(limits.point))
    known = Profile.load(profile, asked.foreign)
    live, _ = load_elastic(elastic, base)
    subject = Subject.of(live.config, live.space, live.strategy)
    flow = _flow_profile(known, profile, limits, subject)
    tokenizer = load_tokenizer(str(live.config.name_or_path))
    batches = load_batches(
        asked.dataset, tokenizer, split=asked.split, num_samples=asked.num_samples,
        max_seq_length=asked.max_seq_length, batch_size=ROWS_AT_ONCE, vocab_size=live.config.vocab_size, seed=SEED,
    )  # fmt: skip
    costs = _KnownCosts(limits, subject, known, profile, flow)
    with tqdm(desc="search", unit="shape", disable=not progress, leave=False) as bar:

        def evaluate(shape: SubnetShape) -> float:
            bar.set_postfix_str(f"judging {shape}")
            bar.update()
            return _loss(live, shape, batches)

        def measure(shape: SubnetShape) -> Costs:
            bar.set_postfix_str(f"running {shape}")
            return costs.measure(shape)

        can_measure = asked.measure and not asked.foreign
        problem = Problem(live.space, limits, costs.predict, evaluate, measure if can_measure else None)
        chosen = search(problem)
    return Frontier.of(problem, asked.searcher, chosen)


class _KnownCosts:
    """Costs of shapes by a profile, which measuring adds to."""

    def __init__(self, budget: Budget, subject: Subject, profile: Profile, path: Path, flow: FlowProfile) -> None:
        self._budget, self._subject, self._profile, self._path, self._flow = budget, subject, profile, path, flow
        self._models: dict[str, CostModel] = cost_models(flow)

    def predict(self, shape: SubnetShape) -> Costs:
        """Return what is known of a shape's costs, by limit."""
        work = Work.of(self._subject.sizes(shape))
        return {
            limit: self._models[limit.kind].predict(work, limit.tokens, str(shape)) for limit in self._budget.limits
        }

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
    """Return what is known of a budget's flow, of this very model."""
    sizes = {str(shape): Work.of(subject.sizes(shape)) for shape in subject.space}
    if profile.digest != config_digest(subject.config) or any(profile.works.get(name) != sizes[name] for name in sizes):
        raise ArtifactError(
            f"{path} is a profile of another model, or of shapes of other sizes; `amoeba profile ELASTIC` makes one of "
            "the checkpoint's own"
        )
    flow = profile.flows.get(str(budget.point))
    if flow is None:
        raise ArtifactError(
            f"{path} knows nothing of {budget.point}, only of {', '.join(profile.flows)}; add it: amoeba profile "
            f"ELASTIC --flow {budget.point} -o {path}"
        )
    longest = max(tokens for cost in flow.shapes.values() for each in cost.rounds for tokens in each.prefill)
    asked = max(limit.tokens for limit in budget.limits)
    if asked > longest:
        raise BudgetError(
            f"the budget is about prompts of {asked} tokens, and {path} has none longer than {longest}; profile with "
            f"--prompts {asked}, to another file"
        )
    return flow


@torch.no_grad()
def _loss(elastic: ElasticModel, shape: SubnetShape, batches: list[Batch]) -> float:
    with elastic.active(shape) as model, evaluating(model):
        return float(PerTokenLoss().measure(model, batches).value)
