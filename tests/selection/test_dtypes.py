"""Selection in bfloat16, which some machines do much faster, chooses what it chooses in float32, up to ties."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import DepthStrategy, WidthStrategy
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import depth_selector_named, importance_named, objective_named, repair_named
from amoeba_plugin.selection.repair.collect import collect_moments
from amoeba_plugin.selection.repair.fold_table import FoldTable, parted
from amoeba_plugin.selection.repair.moments import ChannelMoments
from amoeba_plugin.selection.repair.width import WidthRepair
from amoeba_plugin.selection.width.measured import measured_widths
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.selection.width.trials import Trials
from amoeba_plugin.testing.random_models import random_model
from support.architectures import CONFIGS

Batches = Callable[..., list[dict[str, Tensor]]]
TIE = 0.01  # nats; what rounding to eight bits moves the loss of such a model by
HALF = Fraction(1, 2)


def chosen(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[DepthStrategy, WidthStrategy]:
    adapter, objective = architecture_for("llama"), objective_named("loss")
    fitting, judging = parted(batches)
    with FoldTable.of(LayerRuns.of(model, adapter, fitting)) as folds:
        depth = depth_selector_named("auto").select(
            DepthTask(model, adapter, objective, judging, 2, progress=False, folds=folds)
        )
    runs = LayerRuns.of(model, adapter, batches)
    with ChannelMoments.of(1e9) as moments:
        collect_moments(runs, moments, progress=False)
        trials = Trials(runs, objective, WidthRepair(repair_named("least_squares"), moments))
        task = WidthTask(
            model, adapter, importance_named("obs"), [Fraction(1), HALF], moments.stats, allocation="measured",
            round_to={"mlp": 8}, moments=moments,
        )  # fmt: skip
        width, _ = measured_widths(task, objective, batches, progress=False, trials=trials)
    return depth, width


def test_bfloat16_chooses_as_float32_does(random_batches: Batches) -> None:
    model, batches = random_model(CONFIGS["llama"]), random_batches(4, rows=8)
    rounded = model.to(torch.bfloat16)  # both begin with the same weights
    exact = copy.deepcopy(rounded).float()
    (depth, width), (coarse_depth, coarse_width) = chosen(exact, batches), chosen(rounded, batches)
    assert width.units[HALF] == coarse_width.units[HALF]
    for key, order in width.order.items():
        kept = width.units[HALF][key]
        both = set(order[:kept].tolist()) & set(coarse_width.order[key][:kept].tolist())
        assert len(both) >= 0.9 * kept, key
    for count in depth.kept:
        same = depth.kept[count] == coarse_depth.kept[count]
        assert same or abs(depth.metric[count] - coarse_depth.metric[count]) < TIE
