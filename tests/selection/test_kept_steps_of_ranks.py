"""Two ranks keep steps together: the first one writes and reads, and both go on behind the same step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.kept_steps import NOWHERE, KeptSteps
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import repair_named
from amoeba_plugin.selection.repair.depth import fold_depths
from amoeba_plugin.selection.repair.width import repair_shapes
from amoeba_plugin.selection.width.kept_ranking import Ranking, kept_ranking
from amoeba_plugin.testing.random_models import KEPT, random_model, random_strategy
from support.architectures import CONFIGS
from support.forked import forked

Batches = Callable[..., list[dict[str, Tensor]]]


class StoppedError(Exception):
    pass


class StoppedSteps(KeptSteps):
    """Computes up to one step, and not that."""

    def tensors(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if name == "width_1-2":
            raise StoppedError
        return super().tensors(name, compute)


def selected(model: PreTrainedModel, batches: list[Batch], kept: KeptSteps) -> dict[str, Tensor]:
    """Return the repaired weights, and the order of one group."""
    runs = LayerRuns.of(model, architecture_for("llama"), batches)
    width = kept_ranking(kept, lambda: Ranking(random_strategy(model).width)).width
    assert Fraction(1, 2) in width.units
    folds = fold_depths(runs, DepthStrategy(KEPT), progress=False, kept=kept)
    repairs = repair_shapes(runs, width, repair_named("least_squares"), folds, progress=False, kept=kept)
    return {**repairs.tensors(), "order": width.order["0.mlp"]}


def of_rank(rank: int, model: PreTrainedModel, batches: list[Batch], directory: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    steps = directory / f"steps{rank}"  # ranks need not see each other's disks
    try:
        save_file(selected(model, batches, NOWHERE), directory / f"whole{rank}.safetensors")
        with pytest.raises(StoppedError):
            selected(model, batches, StoppedSteps(steps, {"model": "m"}))
        with pytest.raises(ArtifactError, match="model is other, there it is m"):
            selected(model, batches, KeptSteps(steps, {"model": "other"}))
        save_file(selected(model, batches, KeptSteps(steps, {"model": "m"})), directory / f"again{rank}.safetensors")
        if rank == 0:
            (steps / "folds_3.safetensors").write_bytes(b"")
        distributed.barrier()
        with pytest.raises(ArtifactError, match=r"folds_3\.json is damaged"):
            selected(model, batches, KeptSteps(steps, {"model": "m"}))
    finally:
        distributed.destroy_process_group()


def test_ranks_go_on_behind_the_same_step_with_the_same_bits(random_batches: Batches, tmp_path: Path) -> None:
    model, batches = random_model(CONFIGS["llama"]), random_batches(4, rows=8)
    ranks = [forked(of_rank, rank, model, batches, tmp_path) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first = load_file(tmp_path / "whole0.safetensors")
    for name in ("whole1", "again0", "again1"):
        other = load_file(tmp_path / f"{name}.safetensors")
        assert other.keys() == first.keys()
        assert all(torch.equal(each, first[key]) for key, each in other.items())
    assert len(list((tmp_path / "steps0").glob("*.json"))) == 5
    assert not (tmp_path / "steps1").exists()
