"""Which layers to keep at every depth: the paper's dynamic program, run on a model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.sharing import shard
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.fingerprint import PACKED, model_fingerprint
from amoeba_plugin.models.kept import PARTS, kept_without, removed_names
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.runtime.peak_memory import peak_memory, reset_peak_memory
from amoeba_plugin.runtime.ranks import agreed, gather, rank
from amoeba_plugin.selection.depth.dynamic_program import NEAR, Search, Table, evaluations, exchange_evaluations
from amoeba_plugin.selection.depth.lockstep import WHOLE, Lockstep, Removed
from amoeba_plugin.selection.depth.lockstep_contract import Contract, OneByOne, check_contract
from amoeba_plugin.selection.depth.score_table import MeasuredTable
from amoeba_plugin.selection.hidden_states import where_not_finite
from amoeba_plugin.selection.objectives import Objective, Score
from amoeba_plugin.shape import half_steps

logger = logging.getLogger(__name__)
GIB = 2**30
Granularity = Literal["layer", "sublayer"]


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
    granularity: Granularity = "layer",
    cache_gib: float = 4.0,
    resume_dir: Path | str | None = None,
    progress: bool = True,
) -> DepthStrategy:
    """Find the layers to keep at every depth down to ``min_depth`` (AmoebaLLM, arXiv:2411.10606, section 4.1).

    With N layers (or twice as many sublayers) allowed to go and M of them to go at most, this scores N*M - M(M-1)/2
    subnets, and up to ``beam`` times as many with a beam. Their layers are run in lockstep, so that what subnets share
    is computed once.

    Where torch.distributed is initialised, ranks share the batches out and all return the same.

    Args:
        model: A causal LM with all its layers; its layers and configuration are restored, after an exception too. It
            may be offloaded by accelerate: each layer's weights are then fetched once for all subnets of a step.
        adapter: Its architecture.
        objective: What to make best; equal values are decided by its loss.
        batches: From ``materialise``; the same ones for every candidate.
        min_depth: Layers of the shallowest subnet.
        keep_last: Last layers that are never removed.
        beam: Removal sets that each state of the program keeps. 1 is the paper: as losses of layers do not add up, the
            best set may have a part that is not the best of its own, and a wider beam finds it.
        exchanges: Rounds after the program, in each of which every depth tries to exchange one removed layer for one
            kept. 0 is the paper.
        granularity: "layer" (the paper), or "sublayer": attention and MLP of a layer go apart, each half a layer of
            depth. There are then twice as many depths, and about four times as many subnets.
        cache_gib: GiB of hidden states held in memory; on an accelerator as much again on the CPU. The rest is files.
        resume_dir: Where to keep every score, after every step; what is there already is not measured again.
        progress: Show a progress bar.

    Returns:
        Kept layers and metric for each depth, the whole model's included. Depths need not be nested. What the search
        took, and comparisons too close to call, are in ``DepthStrategy.search``.

    Raises:
        RecipeError: If no layer, or too many, would be removed.
        ArchitectureError: If the adapter does not know the sublayers asked for.
        DataError: If the batches lack what the objective needs, or it cannot tell candidates apart.
        ArtifactError: If ``resume_dir`` holds the scores of another model, other data, or another objective.
    """
    num_layers, by_sublayer = len(adapter.layers(model)), granularity == "sublayer"
    candidates, most = _removable(num_layers, min_depth, keep_last, len(PARTS) if by_sublayer else 1)
    stand_ins = StandIns(adapter.sublayers(model.config), tuple(adapter.layers(model))) if by_sublayer else None
    objective.check(batches)
    reset_peak_memory()
    mine, data = shard(batches)
    identity = _search_identity(model, adapter, objective, data)
    directory = None if resume_dir is None else Path(resume_dir)
    scored = 1 + evaluations(candidates, most, beam) + exchange_evaluations(candidates, most, exchanges)
    silent = not progress or rank() != 0
    with (
        tqdm(total=scored * len(mine), desc="depth search", unit="batch", disable=silent) as bar,
        _Measurement.of(
            model, adapter, objective, batches, mine, candidates, cache_gib * GIB, bar.update, stand_ins
        ) as measure,
        evaluating(model),
    ):
        measured = MeasuredTable.resumed(measure, identity, directory, granularity)
        bar.update(len(measured.scores) * len(mine))
        whole = measured([WHOLE])[0]
        _require_finite(whole, model, adapter, objective, batches)
        search = Search(measured, objective)
        table = search.exchange(search.shrink(candidates, most, beam), candidates, exchanges)
        bar.total = bar.n  # exchanges come back to sets that are known
        report = {"measured": measured.measured, **measure.report(), "near_ties": _near_ties(search, by_sublayer)}
    _log(report)
    return _strategy(num_layers, {0: (WHOLE, whole)} | table, objective.name, report, by_sublayer)


def _require_finite(
    whole: Score, model: PreTrainedModel, adapter: ArchitectureAdapter, objective: Objective, batches: Sequence[Batch]
) -> None:
    if not math.isfinite(whole.value):
        raise DataError(
            f"{objective.name} of the whole model is {whole.value}{where_not_finite(model, adapter, batches)}: "
            "nothing can be compared with it; "
            "check the weights, their dtype (float16 overflows), and the calibration data"
        )


def _strategy(
    num_layers: int, table: Table, objective: str, report: Mapping[str, Any], by_sublayer: bool
) -> DepthStrategy:
    kept, metric, lost = {}, {}, {}
    for count, (removed, score) in table.items():
        depth = half_steps(num_layers - (count / len(PARTS) if by_sublayer else count))
        kept[depth], gone = kept_without(num_layers, removed, by_sublayer)
        metric[depth] = score.value
        if gone:
            lost[depth] = gone
    return DepthStrategy(kept, objective, metric, report, lost)


def _search_identity(
    model: PreTrainedModel, adapter: ArchitectureAdapter, objective: Objective, data: str
) -> dict[str, str]:
    """Return what scores depend on, for who resumes with them."""
    return {
        "model": _model_identity(model, adapter),
        "dtype": str(model.dtype),
        "data": data,
        "objective": _objective_identity(objective),
    }


def _model_identity(model: PreTrainedModel, adapter: ArchitectureAdapter) -> str:
    """Return what tells a model from others of other scores: its weights; if they are packed, also how."""
    weights, _, frame = model_fingerprint(model, adapter).partition(".")
    if weights != PACKED:
        return weights
    method = getattr(model.config, "quantization_config", None)
    stated = method if isinstance(method, dict) or method is None else method.to_dict()
    return f"{json.dumps(stated, default=repr, sort_keys=True)} {frame}"


def _objective_identity(objective: Objective) -> str:
    options = {name: value for name, value in vars(objective).items() if not name.startswith("_")}
    return f"{objective.name} {json.dumps(options, default=repr, sort_keys=True)}" if options else objective.name


@dataclass
class _Measurement:
    """Scores sets of removed layers on the data of all ranks."""

    objective: Objective
    runner: Lockstep | OneByOne
    batches: Sequence[Batch]
    progress: Callable[[int], object]

    @classmethod
    @contextmanager
    def of(
        cls,
        model: PreTrainedModel,
        adapter: ArchitectureAdapter,
        objective: Objective,
        batches: Sequence[Batch],
        mine: Sequence[Batch],
        removable: int,
        cache_bytes: float,
        progress: Callable[[int], object],
        stand_ins: StandIns | None = None,
    ) -> Iterator[_Measurement]:
        contract = Contract(f"objective {objective.name} measures it as a whole")
        if objective.is_separable:
            contract = check_contract(model, adapter, batches, stand_ins)
        if agreed(contract.broken is None):
            with Lockstep.of(
                model, adapter, mine, removable, cache_bytes,
                returns_tuples=contract.returns_tuples, stand_ins=stand_ins,
            ) as lockstep:  # fmt: skip
                yield cls(objective, lockstep, batches, progress)
        else:
            logger.warning(
                "depth search: every subnet of this %s is run from its embeddings, which takes several times as long: "
                "%s", type(model).__name__, contract.broken or "another rank has to",
            )  # fmt: skip
            with OneByOne.of(model, adapter, mine, stand_ins) as one_by_one:
                yield cls(objective, one_by_one, batches, progress)

    def __call__(self, sets: Sequence[Removed]) -> list[Score]:
        if isinstance(self.runner, OneByOne) and not self.objective.is_separable:
            return [self._measure(self.runner, removed) for removed in sets]
        observed = self.runner.observe(self.objective, sets, lambda: self.progress(1))
        return [self.objective.score(rows) for rows in _gathered(observed)]

    def _measure(self, runner: OneByOne, removed: Removed) -> Score:
        score = runner.measure(self.objective, removed, self.batches)
        self.progress(len(runner.batches))
        # such scores cannot be put together: ranks that see different data follow the first one
        value, loss = gather(torch.tensor([[score.value, score.loss]], dtype=torch.float64))[0].tolist()
        return Score(value, loss)

    def report(self) -> dict[str, Any]:
        """Return what the search took in this process."""
        runner = self.runner
        if isinstance(runner, OneByOne):
            return {"lockstep": False, "layer_forwards": runner.layer_forwards, "peak_bytes": peak_memory()}
        states = {
            f"states on {place}": runner.cached.peak.get(place, 0) + runner.flying.peak.get(place, 0)
            for place in {**runner.cached.peak, **runner.flying.peak}
        }
        return {
            "lockstep": True,
            "layer_forwards": runner.layer_forwards,
            "layer_calls": runner.layer_calls,
            "peak_bytes": states | peak_memory(),
        }


def _gathered(observed: Sequence[Tensor]) -> list[Tensor]:
    """Return the observations of all ranks: for each set (rows, columns)."""
    rows = torch.stack(list(observed), dim=1)  # (rows, sets, columns); columns unknown where a rank has no batch
    columns = int(gather(torch.tensor([rows.shape[-1]])).max())
    everywhere = gather(rows if len(rows) else rows.new_zeros(0, len(observed), columns))
    return [everywhere[:, number] for number in range(len(observed))]


def _near_ties(search: Search, by_sublayer: bool) -> list[dict[str, list[int] | list[str]]]:
    def written(removed: Removed) -> list[int] | list[str]:
        return removed_names(removed, by_sublayer) if by_sublayer else sorted(removed)

    pairs = dict.fromkeys((tie.preferred, tie.other) for tie in search.near_ties)
    return [{"preferred": written(preferred), "other": written(other)} for preferred, other in pairs]


def _log(report: Mapping[str, Any]) -> None:
    peak = ", ".join(f"{place} {size / GIB:.2f} GiB" for place, size in report["peak_bytes"].items())
    logger.info(
        "depth search: %d subnets, %.0f layer-forwards; peak memory: %s",
        report["measured"], report["layer_forwards"], peak,
    )  # fmt: skip
    if report["near_ties"]:
        logger.warning(
            "depth search: %d comparisons of subnets are within %g of each other, relative, and may turn out the other "
            "way on other hardware; the strategy lists them as near_ties. First: without %s, or without %s",
            len(report["near_ties"]), NEAR, report["near_ties"][0]["preferred"], report["near_ties"][0]["other"],
        )  # fmt: skip


def _removable(num_layers: int, min_depth: int, keep_last: int, per_layer: int) -> tuple[int, int]:
    """Return how many steps, ``per_layer`` for each layer, may go, and how many of them go at most."""
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
    return per_layer * (num_layers - keep_last), per_layer * (num_layers - min_depth)
