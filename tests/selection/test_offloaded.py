"""Models whose weights accelerate offloads: selection sees what it sees of the whole model, cutting is refused."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.modifiers import WidthShrinkingModifier
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.depth.layer_importance import angular_distances, magnitude
from amoeba_plugin.selection.registry import importance_named
from amoeba_plugin.selection.width.ranking import rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from support.models import offloaded

TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[dict[str, Tensor]]]


def widths_of(model: PreTrainedModel, batches: list[dict[str, Tensor]], importance: str) -> WidthStrategy:
    adapter = architecture_for(model.config.model_type)
    statistics, widths = collect_statistics(model, adapter, batches, progress=False), [Fraction(1), Fraction(1, 2)]
    return rank_widths(WidthTask(model, adapter, importance_named(importance), widths, statistics, allocation="global"))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_selection_sees_the_whole_model(
    tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path, where: str, model_type: str
) -> None:
    batches, adapter = random_batches(lengths=(12, 7)), architecture_for(model_type)
    whole, model = tiny_model(model_type), offloaded(tiny_model(model_type), where, tmp_path)
    assert magnitude(model, adapter) == magnitude(whole, adapter)
    assert torch.equal(angular_distances(model, adapter, batches), angular_distances(whole, adapter, batches))
    for importance in ("flap", "group_magnitude"):
        found, expected = widths_of(model, batches, importance), widths_of(whole, batches, importance)
        assert found.units == expected.units
        assert all(torch.equal(order, expected.order[key]) for key, order in found.order.items())
    strategy = SubnetStrategy(DepthStrategy.whole(4), found, model_fingerprint(model, adapter))
    with pytest.raises(ArchitectureError, match="accelerate offloads weights of this model"):
        ElasticModel(model, strategy)


def test_sizes_are_not_tried_on_it(tiny_model: TinyModel, random_batches: RandomBatches, tmp_path: Path) -> None:
    model = offloaded(tiny_model("llama"), "cpu", tmp_path)
    selection: Any = SimpleNamespace(adapter=architecture_for("llama"), batches=random_batches(), depth=None)

    def ranked(modifier: WidthShrinkingModifier) -> WidthStrategy:
        return modifier._ranked(model, selection).width

    modifier = WidthShrinkingModifier(widths=["1", "1/2"])
    with pytest.raises(ArchitectureError, match="set allocation: uniform or global"):
        ranked(modifier)
    uniform = {"widths": ["1", "1/2"], "allocation": "uniform"}
    modifier = WidthShrinkingModifier(**uniform)
    assert ranked(modifier).units
    assert modifier.repair == "none"
    with pytest.raises(
        ArchitectureError, match="repair: least_squares is impossible: accelerate offloads.*repair: none"
    ):
        ranked(WidthShrinkingModifier(**uniform, repair="least_squares"))
