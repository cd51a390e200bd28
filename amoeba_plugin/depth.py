"""Which layers to keep at every depth: the paper's dynamic program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.architecture import ArchitectureAdapter, copy_config
from amoeba_plugin.calibration import Batch
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.layer_flow import watched, where_not_finite
from amoeba_plugin.objectives import Objective, Score, better, evaluating, model_inputs
from amoeba_plugin.strategy import DepthStrategy


def search_depths(
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    min_depth: int,
    keep_last: int = 1,
    beam: int = 1,
    exchanges: int = 0,
    progress: bool = True,
) -> DepthStrategy:
    """Find the layers to keep at every depth down to ``min_depth`` (AmoebaLLM, arXiv:2411.10606, section 4.1).

    With N layers allowed to go and M of them to go at most, this scores the model N*M - M(M-1)/2 times, and up to
    ``beam`` times as often with a beam.

    Args:
        model: A causal LM with all its layers; its layers and configuration are restored, after an exception too.
        adapter: Its architecture.
        objective: What to make best; equal values are decided by its loss.
        batches: From ``materialise``; the same ones for every candidate.
        min_depth: Layers of the shallowest subnet.
        keep_last: Last layers that are never removed.
        beam: Removal sets that each state of the program keeps. 1 is the paper: as losses of layers do not add up, the
            best set may have a part that is not the best of its own, and a wider beam finds it.
        exchanges: Rounds after the program, in each of which every depth tries to exchange one removed layer for one
            kept. 0 is the paper.
        progress: Show a progress bar.

    Returns:
        Kept layers and metric for each depth, the whole model's included. Depths need not be nested.

    Raises:
        RecipeError: If no layer, or too many, would be removed.
        DataError: If the batches lack what the objective needs, or it cannot tell candidates apart.
    """
    num_layers = len(adapter.layers(model))
    candidates, most = _require_removable(num_layers, min_depth, keep_last)
    objective.check(batches)
    with _Trial.of(model, adapter, batches) as trial:
        whole = objective.measure(model, batches)
        if not math.isfinite(whole.value):
            raise DataError(
                f"{objective.name} of the whole model is {whole.value}{where_not_finite(model, adapter, batches)}: "
                "nothing can be compared with it; "
                "check the weights, their dtype (float16 overflows), and the calibration data"
            )
        total = evaluations(candidates, most, beam) + exchanges * sum(n * (candidates - n) for n in range(1, most + 1))
        with tqdm(total=total, desc="depth search", disable=not progress) as bar:

            def evaluate(removed: frozenset[int]) -> Score:
                score = trial.measure(objective, removed)
                bar.update()
                return score

            table = shrink(candidates, most, evaluate, objective, beam)
            table = {
                count: exchange(removed, score, candidates, evaluate, objective, exchanges)
                for count, (removed, score) in table.items()
            }
    kept = {num_layers: tuple(range(num_layers))}
    metric = {num_layers: whole.value}
    for count, (removed, score) in table.items():
        kept[num_layers - count] = tuple(index for index in range(num_layers) if index not in removed)
        metric[num_layers - count] = score.value
    return DepthStrategy(kept, objective.name, metric)


def evaluations(candidates: int, most: int, beam: int = 1) -> int:
    """Return how many subnets the dynamic program scores.

    >>> evaluations(31, 12), evaluations(31, 12, beam=4)
    (306, 1094)
    """
    # state (n-1, m-1) holds min(b, number of ways to choose m-1 of n-1 layers) sets, and each is extended by layer n
    return sum(
        min(beam, math.comb(visited - 1, count - 1))
        for visited in range(1, candidates + 1)
        for count in range(1, min(visited, most) + 1)
    )


def shrink(
    candidates: int, most: int, evaluate: Callable[[frozenset[int]], Score], objective: Objective, beam: int = 1
) -> dict[int, tuple[frozenset[int], Score]]:
    """Run the dynamic program over layers ``candidates - 1`` to 0.

    State (n, m): of the first n layers visited m are removed, all others are active. Keeping a layer costs nothing,
    removing it costs one evaluation of each set kept in the state before.

    Args:
        candidates: N, layers that may go: indices 0 to N - 1.
        most: M, the most layers to remove.
        evaluate: Scores the model without a set of layers.
        objective: Says which score is better.
        beam: Sets kept per state; 1 is the paper.

    Returns:
        For m from 1 to M the removed layers and their score.

    Raises:
        DataError: If no score is finite, or all are the same.
    """
    best: dict[int, list[tuple[frozenset[int], Score]]] = {}  # by count, best first
    seen: list[Score] = []
    for visited in range(1, candidates + 1):
        layer = candidates - visited  # from the last candidate towards layer 0
        before = {0: [frozenset[int]()]} | {count: [removed for removed, _ in kept] for count, kept in best.items()}
        for count in range(1, min(visited, most) + 1):
            # S[n,m] = S[n-1,m-1] + {n-th layer} where that is strictly better than S[n-1,m], else S[n-1,m]
            for earlier in before[count - 1]:
                removed = earlier | {layer}
                score = evaluate(removed)
                seen.append(score)
                _insert(best.setdefault(count, []), removed, score, objective, beam)
    if not any(math.isfinite(score.value) for score in seen):
        raise DataError(
            f"{objective.name} is NaN or infinite without any of the layers; check weights, dtype and calibration data"
        )
    if len(seen) > 1 and len(set(seen)) == 1:
        raise DataError(
            f"{objective.name} is {seen[0].value} for all {len(seen)} candidates: it cannot tell layers apart; "
            "give more or other calibration data, or another objective"
        )
    return {count: kept[0] for count, kept in best.items()}


def exchange(
    removed: frozenset[int],
    score: Score,
    candidates: int,
    evaluate: Callable[[frozenset[int]], Score],
    objective: Objective,
    rounds: int,
) -> tuple[frozenset[int], Score]:
    """Improve a removal set by exchanging single layers; stops early where no exchange is strictly better.

    Args:
        removed: The set to begin with.
        score: Its score.
        candidates: N, layers that may go: indices 0 to N - 1.
        evaluate: Scores the model without a set of layers.
        objective: Says which score is better.
        rounds: Most exchanges; each costs |removed| * (N - |removed|) evaluations.
    """
    for _ in range(rounds):
        best, best_score = removed, score
        for back, gone in itertools.product(sorted(removed), sorted(set(range(candidates)) - removed)):
            other = removed - {back} | {gone}
            other_score = evaluate(other)
            if better(objective, other_score, best_score):
                best, best_score = other, other_score
        if best == removed:
            break
        removed, score = best, best_score
    return removed, score


def _insert(
    kept: list[tuple[frozenset[int], Score]], removed: frozenset[int], score: Score, objective: Objective, beam: int
) -> None:
    """Put a set where its score belongs, behind those it is not strictly better than, and forget what falls off."""
    place = next((place for place, (_, other) in enumerate(kept) if better(objective, score, other)), len(kept))
    kept.insert(place, (removed, score))
    del kept[beam:]


def _require_removable(num_layers: int, min_depth: int, keep_last: int) -> tuple[int, int]:
    if not 1 <= min_depth < num_layers:
        raise RecipeError(
            f"min_depth {min_depth} is impossible: the model has {num_layers} layers; take 1..{num_layers - 1}, "
            "or leave DepthShrinkingModifier out to keep all layers"
        )
    if not 0 <= keep_last <= min_depth:
        raise RecipeError(
            f"keep_last {keep_last} is impossible with min_depth {min_depth}: layers never removed are among those "
            f"kept; take 0..{min_depth}"
        )
    return num_layers - keep_last, num_layers - min_depth


@dataclass
class _Trial:
    """Scores a model without some of its layers; a context that gives the model back whole and in its own mode.

    Layers before the first removed one compute the same for all candidates that share it, and the dynamic program
    visits such candidates in a row. Their output is computed once and handed in as ``inputs_embeds``.
    """

    model: PreTrainedModel
    adapter: ArchitectureAdapter
    batches: Sequence[Batch]
    layers: tuple[nn.Module, ...]
    config: PretrainedConfig
    resumable: bool
    start: int = 0
    started: Sequence[Batch] = ()

    @classmethod
    @contextmanager
    def of(cls, model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch]) -> Iterator[_Trial]:
        layers, config = tuple(adapter.layers(model)), copy_config(model.config)
        try:
            with evaluating(model):
                yield cls(model, adapter, batches, layers, config, _takes_states(model, adapter), 0, batches)
        finally:
            adapter.set_layers(model, layers, range(len(layers)), config)

    def measure(self, objective: Objective, removed: frozenset[int]) -> Score:
        kept = [index for index in range(len(self.layers)) if index not in removed]
        start = min(min(removed), kept[-1]) if self.resumable else 0
        if start != self.start:
            self.start, self.started = start, self._states_before(start)
        self._activate([index for index in kept if index >= start])
        return objective.measure(self.model, self.started)

    def _activate(self, indices: Sequence[int]) -> None:
        self.adapter.set_layers(self.model, [self.layers[index] for index in indices], indices, self.config)

    def _states_before(self, start: int) -> Sequence[Batch]:
        if start == 0:
            return self.batches
        self._activate(range(start))
        batches = []
        for batch in self.batches:
            with watched(self.layers[start - 1]) as flow:
                self.adapter.decoder(self.model)(**model_inputs(batch, self.model.device), use_cache=False)
            rest = {name: value for name, value in batch.items() if name not in ("input_ids", "inputs_embeds")}
            batches.append({**rest, "inputs_embeds": flow[0][1].to(batch["labels"].device)})
        return batches


def _takes_states(model: PreTrainedModel, adapter: ArchitectureAdapter) -> bool:
    # Some decoders scale their embeddings first (Gemma): states handed in as inputs_embeds would be scaled again.
    states = torch.linspace(-1, 1, 2 * model.config.hidden_size).view(1, 2, -1).to(model.device, model.dtype)
    with evaluating(model), watched(adapter.layers(model)[0]) as flow:
        adapter.decoder(model)(inputs_embeds=states, use_cache=False)
    return torch.equal(flow[0][0], states)
