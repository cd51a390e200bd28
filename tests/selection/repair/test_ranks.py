"""Two ranks that share the data repair as one process that has all of it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.in_order import in_order
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import depth_selector_named, objective_named, repair_named
from amoeba_plugin.selection.repair.collect import collect_moments
from amoeba_plugin.selection.repair.depth import fold_depths
from amoeba_plugin.selection.repair.fold_table import FoldTable, parted
from amoeba_plugin.selection.repair.moments import ChannelMoments
from amoeba_plugin.selection.repair.width import WidthRepair, repair_shapes
from amoeba_plugin.selection.width.trials import Trial, Trials
from amoeba_plugin.testing.random_models import KEPT, random_model, random_strategy
from support.architectures import CONFIGS
from support.forked import forked

Batches = Callable[..., list[dict[str, Tensor]]]


def everything(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Return all that repair computes from data: weights, the layers that a search keeps, scores of shapes tried."""
    adapter, strategy, objective = architecture_for("llama"), random_strategy(model), objective_named("loss")
    runs = LayerRuns.of(model, adapter, batches)
    folds = fold_depths(runs, DepthStrategy(KEPT), progress=False)
    found = repair_shapes(runs, strategy.width, repair_named("least_squares"), folds, progress=False).tensors()
    fitting, judging = parted(batches)
    with FoldTable.of(LayerRuns.of(model, adapter, fitting)) as table:
        task = DepthTask(model, adapter, objective, judging, 2, progress=False, folds=table)
        searched = depth_selector_named("lazy_greedy").select(task)
    for depth, kept in searched.kept.items():
        found[f"kept {depth}"] = torch.tensor(kept)
        found[f"metric {depth}"] = torch.tensor(searched.metric[depth])
    with ChannelMoments.of(1e9) as moments, in_order(model, adapter, strategy.width) as elastic:
        collect_moments(runs, moments, progress=False)
        trials = Trials(runs, objective, WidthRepair(repair_named("least_squares"), moments), KEPT, folds)
        tried = [Trial({"attention": 2, "mlp": 64}), Trial({"attention": 3, "mlp": 100}, 3)]
        found["tried"] = torch.tensor([score.value for score in trials.scores(elastic, tried)])
    assert Fraction(1, 2) in strategy.width.units
    return found


def of_rank(rank: int, model: PreTrainedModel, batches: list[Batch], directory: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    try:
        save_file(everything(model, batches), directory / f"{rank}.safetensors")
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("split", ["by us", "by the loader"])
def test_ranks_repair_together_as_one_would(split: str, random_batches: Batches, tmp_path: Path) -> None:
    model, batches = random_model(CONFIGS["llama"]), random_batches(4, rows=8)
    wanted = everything(model, batches)
    given = [batches[:2], batches[2:]] if split == "by the loader" else [batches, batches]
    ranks = [forked(of_rank, rank, model, given[rank], tmp_path) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == wanted.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-4, msg=name)
