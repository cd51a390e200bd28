"""Which layers to keep at every depth: the paper's dynamic program, run on a model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import DataError
from amoeba_plugin.models.fingerprint import model_identity
from amoeba_plugin.models.kept import Kept, kept_without, removed_names
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.peak_memory import reset_peak_memory
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.selection.depth.dynamic_program import (
    AT_ONCE,
    NEAR,
    Search,
    Table,
    evaluations,
    exchange_evaluations,
)
from amoeba_plugin.selection.depth.runner import GIB, runner_for
from amoeba_plugin.selection.depth.score_table import MeasuredTable
from amoeba_plugin.selection.depth.selectors import least_angular_distance, least_block_influence
from amoeba_plugin.selection.depth.steps import WHOLE, Removed, steps_per_layer
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.hidden_states import where_not_finite
from amoeba_plugin.selection.objectives import Objective, Score
from amoeba_plugin.selection.over_ranks import share_of
from amoeba_plugin.shape import half_steps

logger = logging.getLogger(__name__)
LAZY = 0.4  # subnets that lazy removal measures, of those that greedy does: 0.2 to 0.5

Start = Callable[[Search, int, int], Table]  # of what may go, and how much of it at most


def search_depths(task: DepthTask) -> DepthStrategy:
    """Find the layers to keep at every depth down to ``min_depth`` (AmoebaLLM, arXiv:2411.10606, section 4.1).

    With N layers (or twice as many sublayers) allowed to go and M of them to go at most, this scores N*M - M(M-1)/2
    subnets, and up to ``beam`` times as many with a beam. Their layers are run in lockstep, so that what subnets share
    is computed once.

    Where torch.distributed is initialised, ranks share the batches out and all return the same. A model that
    accelerate offloads has each layer's weights fetched once for all subnets of a step.

    Returns:
        Kept layers and metric for each depth, the whole model's included. Depths need not be nested. What the search
        took, and comparisons too close to call, are in ``DepthStrategy.search``.

    Raises:
        RecipeError: If no layer, or too many, would be removed.
        ArchitectureError: If the adapter does not know the sublayers asked for.
        DataError: If the batches lack what the objective needs, or it cannot tell candidates apart.
        ArtifactError: If ``resume_dir`` holds the scores of another model, other data, or another objective, or another
            process writes there.
    """
    options = task.options
    return _searched(task, "dynamic_program", lambda search, *sizes: search.shrink(*sizes, options.beam), options.beam)


def search_greedily(task: DepthTask) -> DepthStrategy:
    """Remove, again and again, the layer without which the rest is best; nested. Like :func:`search_depths` else."""
    return _searched(task, "greedy", lambda search, *sizes: search.remove_one_by_one(*sizes), 1)


def search_lazily(task: DepthTask) -> DepthStrategy:
    """Remove layers one by one as :func:`search_greedily` does, and measure a fraction of what it measures.

    A layer that was dear to remove before is measured again only when nothing that was measured since is cheaper.
    """
    return _searched(task, "lazy_greedy", lambda search, *sizes: search.remove_one_by_one(*sizes, AT_ONCE), LAZY)


def search_all_ways(task: DepthTask) -> DepthStrategy:
    """Take, for every depth, the best that the program, greedy removal of either kind, and published selectors find.

    All are measured on the same batches, a set that several of them ask for once: never worse there than any of them,
    for the layer-forwards of program and greedy removal, two passes, and as many subnets as there are depths for each
    of Block Influence and the angular distance. Like :func:`search_depths` else.
    """
    published: list[Removed] = []
    for select in (least_block_influence, least_angular_distance):
        with suppress(DataError):  # it cannot tell the layers apart
            found = select(task)
            published += [_steps(task, found.removed(depth)) for depth in found.kept if depth != task.num_layers]

    def start(search: Search, candidates: int, most: int) -> Table:
        program = search.shrink(candidates, most, task.options.beam)
        greedy = [search.remove_one_by_one(candidates, most), search.remove_one_by_one(candidates, most, AT_ONCE)]
        found = [removed for table in greedy for removed, _ in table.values()]
        return search.best_of(program, list(dict.fromkeys(found + published)))

    return _searched(task, "auto", start, task.options.beam + 1)


def _steps(task: DepthTask, removed: Sequence[Kept]) -> Removed:
    per_layer = steps_per_layer(task.options.granularity)
    return Removed(step for layer in removed for step in range(per_layer * int(layer), per_layer * (int(layer) + 1)))


def _searched(task: DepthTask, name: str, start: Start, beam: float) -> DepthStrategy:
    options = task.options
    per_layer = steps_per_layer(options.granularity)
    candidates, most = per_layer * task.removable(), per_layer * (task.num_layers - task.min_depth)
    task.objective.check(task.batches)
    reset_peak_memory()
    mine, data = share_of(task.objective, task.batches)
    scored = 1 + round(min(beam, 1) * evaluations(candidates, most, max(1, int(beam))))
    scored += exchange_evaluations(candidates, most, options.exchanges)
    silent = not task.progress or rank() != 0
    kept = [] if options.resume_dir is None or rank() != 0 else [Path(options.resume_dir)]
    with (
        owning(*kept),
        StageBar(
            total=scored * len(mine),
            desc="depth search",
            unit="batch",
            disable=silent,
            shorter=f"{LESS_DATA}, max_batches",
        ) as bar,
        runner_for(task, mine, candidates) as runner,
        evaluating(task.model),
    ):

        def measure(sets: Sequence[Removed]) -> list[Score]:
            if task.folds is not None:
                task.folds.prepare(sets)
            return runner.measure(task.objective, sets, bar.update)

        measured = _table(task, measure, data)
        bar.update(len(measured.scores) * len(mine))
        whole = measured([WHOLE])[0]
        _require_finite(whole, task)
        search = Search(measured, task.objective)
        table = search.exchange(start(search, candidates, most), candidates, options.exchanges)
        bar.total = bar.n  # sets that are known are not measured again
        report = {"measured": measured.measured, **runner.report(), "near_ties": _near_ties(search, per_layer > 1)}
    _log(report)
    return _strategy(task, name, {0: (WHOLE, whole)} | table, report)


def _table(task: DepthTask, measure: Callable[[Sequence[Removed]], Sequence[Score]], data: str) -> MeasuredTable:
    """Return the table of scores, which begins with what ``resume_dir`` holds.

    Args:
        task: What the scores are of.
        measure: Scores sets that the table does not have.
        data: Digest of the calibration data.
    """
    identity = {
        "model": model_identity(task.model, task.adapter),
        "dtype": str(task.model.dtype),
        "data": data,
        "objective": _objective_identity(task.objective),
        "repair": "none" if task.folds is None else f"folds of {task.folds.data}",
    }
    directory = None if task.options.resume_dir is None else Path(task.options.resume_dir)
    return MeasuredTable.resumed(measure, identity, directory, task.options.granularity)


def _require_finite(whole: Score, task: DepthTask) -> None:
    if not math.isfinite(whole.value):
        where = where_not_finite(task.model, task.adapter, task.batches)
        raise DataError(
            f"{task.objective.name} of the whole model is {whole.value}{where}: nothing can be compared with it; "
            "check the weights, their dtype (float16 overflows), and the calibration data"
        )


def _strategy(task: DepthTask, name: str, table: Table, report: Mapping[str, Any]) -> DepthStrategy:
    num_layers, per_layer = task.num_layers, steps_per_layer(task.options.granularity)
    kept, metric, lost = {}, {}, {}
    for count, (removed, score) in table.items():
        depth = half_steps(num_layers - count / per_layer)
        kept[depth], gone = kept_without(num_layers, removed, per_layer > 1)
        metric[depth] = score.value
        if gone:
            lost[depth] = gone
    return DepthStrategy(kept, task.objective.name, metric, report, lost, name)


def _objective_identity(objective: Objective) -> str:
    options = {name: value for name, value in vars(objective).items() if not name.startswith("_")}
    return f"{objective.name} {json.dumps(options, default=repr, sort_keys=True)}" if options else objective.name


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
