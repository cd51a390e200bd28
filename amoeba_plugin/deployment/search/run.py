"""A search on an elastic model: costs from its profile, quality from running it at its shapes, the last word from the
engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.costs import KnownCosts
from amoeba_plugin.deployment.search.evaluators import Judge
from amoeba_plugin.deployment.search.finalists import Settled, measure_schemes, settle
from amoeba_plugin.deployment.search.frontier import ELASTIC, Frontier
from amoeba_plugin.deployment.search.harm import harm_of
from amoeba_plugin.deployment.search.problem import Choice, Costs, Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.deployment.search.registry import evaluator_named, searcher_named
from amoeba_plugin.elastic.checkpoint import attached_config, load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import ELASTIC_NAME
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.shape import SubnetShape

__all__ = ["Asked", "ShapeSearch", "search_elastic", "search_shapes"]


def search_shapes(
    elastic: Path, profile: Path, budget: str, asked: Asked, base: str | None = None, progress: bool = True
) -> Frontier:
    """Find the best shape of an elastic checkpoint within a budget, and the best scheme where the budget names several.

    Args:
        elastic: The checkpoint.
        profile: What its shapes cost.
        budget: As it is written.
        asked: How to search.
        base: Where the base model is now, if it moved.
        progress: Show how many shapes were evaluated.

    Raises:
        ArtifactError: If the profile is of another model, or lacks a flow.
        BudgetError: If the budget is none, or no shape keeps it.
        DataError: If the text or the questions cannot be read.
        DeploymentError: If an engine cannot hold a finalist, or fails.
        PluginError: If nobody registered the flow, the searcher or the evaluator.
    """
    limits = Budget.parse(budget)
    searcher_named(asked.searcher), evaluator_named(asked.evaluator)  # before the model loads
    for point in limits.points:
        point_named(str(point))
    Profile.load(profile, asked.foreign)
    live, _ = load_elastic(elastic, base)
    return ShapeSearch(live, profile, asked, progress=progress, name=str(elastic)).within(limits)


def search_elastic(
    live: ElasticModel, profile: Path, limits: Budget, asked: Asked, progress: bool = True, judge: Judge | None = None
) -> Frontier:
    """Find the best shape of a live elastic model within a budget; errors are those of :func:`search_shapes`.

    A judge, where one is given, takes the place of the evaluator that was asked for.
    """
    return ShapeSearch(live, profile, asked, judge, progress).within(limits)


class ShapeSearch:
    """Searches of one elastic model: what was evaluated or measured for one budget is known for the next.

    Args:
        live: The model.
        profile: What its shapes cost.
        asked: How to search.
        judge: In place of the evaluator that was asked for.
        progress: Show how many shapes were evaluated.
        name: Of the elastic checkpoint, for commands that deploy it.

    Raises:
        ArtifactError: If the profile is none, damaged, or of another machine.
        DataError: If the text or the questions cannot be read.
        PluginError: If nobody registered the searcher or the evaluator.
    """

    def __init__(
        self, live: ElasticModel, profile: Path, asked: Asked, judge: Judge | None = None, progress: bool = True,
        name: str = ELASTIC,
    ) -> None:  # fmt: skip
        self._search, self._path, self._asked, self._progress = searcher_named(asked.searcher), profile, asked, progress
        self._profile, self._name = Profile.load(profile, asked.foreign), name
        self._subject = Subject.of(live.config, live.space, live.strategy, attached_config(live))
        if judge is None:
            judge = evaluator_named(asked.evaluator)(live, load_tokenizer(str(live.config.name_or_path)), asked)
        self._judge, self._harm_of = judge, harm_of(live, judge)
        self._qualities: dict[SubnetShape, Quality] = {}
        self._harms: dict[Choice, Quality] = {}

    def within(self, budget: Budget) -> Frontier:
        """Search within a budget; errors are those of :func:`search_shapes`."""
        costs = KnownCosts(budget, self._subject, self._profile, self._path)
        with tqdm(desc="search", unit="shape", disable=not self._progress, leave=False) as bar:
            problem = self._problem(budget, costs, bar)
            settled = self._settled(problem)
        return Frontier.of(problem, self._asked, self._judge.unit, settled, self._name)

    def _problem(self, budget: Budget, costs: KnownCosts, bar: Any) -> Problem:
        def evaluate(shape: SubnetShape) -> Quality:
            bar.set_postfix_str(f"judging {shape}")
            bar.update()
            if shape not in self._qualities:
                self._qualities[shape] = self._judge.judge(shape)
            return self._qualities[shape]

        def measure(choices: Sequence[Choice]) -> Mapping[Choice, Costs]:
            bar.set_postfix_str(f"running {', '.join(map(str, choices))}")
            return costs.measure(choices)

        def harm(choice: Choice) -> Quality:
            bar.set_postfix_str(f"judging {choice} in its engine")
            if choice not in self._harms:
                self._harms[choice] = self._harm_of(choice)
            return self._harms[choice]

        can_measure = self._asked.measure and not self._asked.foreign
        asks = self._asked.finalists > 0 and self._judge.asks_engines
        return Problem(
            self._subject.space, budget, costs.predict, evaluate, measure if can_measure else None,
            self._judge.larger_is_better, harm if asks else None, _exact(budget), self._asked.trials,
            self._asked.storage, self._study(budget),
        )  # fmt: skip

    def _study(self, budget: Budget) -> str:
        """Return a name that only the same search has: of this checkpoint, on this data, within this budget."""
        asked, record = self._asked, Path(self._name) / ELASTIC_NAME
        model = record.read_text() if record.is_file() else self._name
        told = (model, asked.evaluator, asked.dataset, asked.split, asked.num_samples, asked.max_seq_length)
        return f"{budget} {hashlib.sha256(repr((*told, asked.letters)).encode()).hexdigest()[:16]}"

    def _settled(self, problem: Problem) -> Settled:
        if problem.harm is not None:
            measure_schemes(problem)
        while True:
            self._search(problem)
            settled = settle(problem, self._asked.finalists)
            if not settled.refused:
                return settled


def _exact(budget: Budget) -> set[Point]:
    """Return the points that need no engine: what runs there is what was judged."""
    found = set()
    for point in budget.points:
        flow, _ = point_named(str(point))
        if point.scheme in flow.exact or flow.runs_elastic(point.scheme):
            found.add(point)
    return found
