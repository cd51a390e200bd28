"""Widths: orders of units against loops over channels, and what a ranking says of what it lacks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.errors import DataError
from amoeba_plugin.models.adapter import ChannelAxis, group_key
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import ActivationStats, collect_statistics
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.importance import Importance
from amoeba_plugin.selection.registry import importance_named
from amoeba_plugin.selection.width.ranking import coupled_parameters, rank_widths, standardised
from amoeba_plugin.selection.width.task import WidthTask
from support.strategies import FINE_WIDTHS

TinyModel = Callable[..., PreTrainedModel]
Batches = Callable[..., list[dict[str, Tensor]]]


def looped_unit_scores(channel_scores: list[float], per_unit: int, squared: bool) -> list[float]:
    """Read papers' steps: square attention, standardise over the layer's channels, average over a unit's channels."""
    scores = [score**2 if squared else score for score in channel_scores]
    mean = sum(scores) / len(scores)
    deviation = (sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)) ** 0.5
    standard = [(score - mean) / deviation for score in scores]
    return [sum(standard[i : i + per_unit]) / per_unit for i in range(0, len(scores), per_unit)]


@pytest.mark.parametrize("name", ["flap", "flap_ifv", "flap_wifn", "wanda", "magnitude"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_orders_equal_loops(rank: Any, random_batches: Batches, name: str, model_type: str) -> None:
    importance = importance_named(name)
    model, strategy = rank(model_type, importance=importance)
    stats = collect_statistics(model, architecture_for(model_type), random_batches(lengths=(12, 7)), progress=False)
    for index, layer in enumerate(model.model.layers):
        for group, linear, per_unit in (("attention", layer.self_attn.o_proj, 32), ("mlp", layer.mlp.down_proj, 1)):
            key = f"{index}.{group}"
            channels = importance.score(stats[key], linear.weight.detach()).tolist()
            units = looped_unit_scores(channels, per_unit, name.startswith("flap") and group == "attention")
            order = strategy.order[key].tolist()
            assert sorted(order) == list(range(len(units)))
            ranked = [units[unit] for unit in order]
            assert all(a >= b - 1e-9 for a, b in pairwise(ranked))
    assert strategy.importance == name


def test_equal_units_stay_in_the_order_of_their_indices(rank: Any) -> None:
    constant = Importance("constant", lambda stats, weight: torch.ones(weight.shape[1]))
    for allocation in ("uniform", "global"):
        _, strategy = rank(importance=constant, allocation=allocation)
        assert all(order.tolist() == sorted(order.tolist()) for order in strategy.order.values())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "opt"])
@pytest.mark.parametrize("name", ["taylor", "taylor_vector", "group_magnitude"])
def test_group_importances_equal_loops_over_the_elements_of_units(
    tiny_model: TinyModel, random_batches: Batches, model_type: str, name: str
) -> None:
    model, adapter = tiny_model(model_type, layers=2, **EXTRA.get(model_type, {})), architecture_for(model_type)
    batches = random_batches(3, lengths=(12, 7))
    gradients = loss_gradients(model, coupled_parameters(model, adapter), batches, progress=False)
    strategy = rank_widths(WidthTask(model, adapter, importance_named(name), FINE_WIDTHS, gradients=gradients))
    plain = copy.deepcopy(model)
    targets = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [plain(**batch, use_cache=False).loss * count for batch, count in zip(batches, targets, strict=True)]
    (sum(losses) / sum(targets)).backward()
    for index, layer in enumerate(adapter.layers(plain)):
        for group in adapter.channel_groups(model.config):
            scores = [
                sum(
                    looped(name, layer, axis, unit, axis is group.consumer)
                    for axis in (*group.producers, group.consumer)
                )
                for unit in range(group.units)
            ]
            key = group_key(index, group)
            ranked = [scores[unit] for unit in strategy.order[key].tolist()]
            assert all(a >= b * (1 - 1e-4) for a, b in pairwise(ranked))
            assert sorted(strategy.order[key].tolist()) == list(range(group.units))


EXTRA = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 64}}


def looped(name: str, layer: nn.Module, axis: ChannelAxis, unit: int, is_consumer: bool) -> float:
    """Score one unit's part of one linear, channel by channel."""
    weight = layer.get_submodule(axis.path).weight
    total = 0.0
    for within in range(axis.channels_per_unit):
        channel = axis.first_channel + unit * axis.channels_per_unit + within
        w, g = (tensor[:, channel] if is_consumer else tensor[channel] for tensor in (weight, weight.grad))
        total += {
            "taylor": (w * g).abs().sum(),
            "taylor_vector": (w * g).sum().abs(),
            "group_magnitude": w.square().sum(),
        }[name].item()
    return total


def test_taylor_says_which_gradient_it_lacks(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match=r"importance taylor needs the gradient of 0\.self_attn\.q_proj"):
        rank_widths(WidthTask(model, architecture_for("llama"), importance_named("taylor"), FINE_WIDTHS))


def test_bias_compensation_stores_mean_inputs(rank: Any, random_batches: Batches) -> None:
    model, strategy = rank(bias_compensation=True)
    stats = collect_statistics(model, architecture_for("llama"), random_batches(lengths=(12, 7)), progress=False)
    assert strategy.bias_compensation
    assert strategy.mean_input.keys() == strategy.order.keys()
    for key, mean in strategy.mean_input.items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, stats[key].mean.float())
    assert rank()[1].mean_input == {}


def test_standardised_of_constants_and_single_channels_is_zero() -> None:
    assert standardised(torch.full((5,), 7.0)).tolist() == [0.0] * 5
    assert standardised(torch.tensor([3.0])).tolist() == [0.0]


def test_magnitude_needs_no_statistics_the_others_say_which_lack(tiny_model: TinyModel) -> None:
    model, adapter = tiny_model("llama"), architecture_for("llama")
    assert rank_widths(WidthTask(model, adapter, importance_named("magnitude"), FINE_WIDTHS)).mean_input == {}
    with pytest.raises(
        DataError, match=r"importance flap needs statistics of 0\.attention over 128 channels, there are none"
    ):
        rank_widths(WidthTask(model, adapter, importance_named("flap"), FINE_WIDTHS))
    with pytest.raises(DataError, match="bias_compensation needs statistics"):
        rank_widths(WidthTask(model, adapter, importance_named("magnitude"), FINE_WIDTHS, bias_compensation=True))
    wrong = {"0.attention": ActivationStats.empty(64)}
    with pytest.raises(DataError, match="there are 64 channels; collect them on this model"):
        rank_widths(WidthTask(model, adapter, importance_named("flap"), FINE_WIDTHS, wrong))


def test_scores_that_are_not_finite_are_refused(rank: Any) -> None:
    broken = Importance("broken", lambda stats, weight: torch.full((weight.shape[1],), float("nan")))
    with pytest.raises(DataError, match=r"importance broken of 0\.attention is NaN or infinite"):
        rank(importance=broken)


@pytest.mark.parametrize(
    ("model_type", "level", "message"),
    [
        ("llama", "INFO", "biases that compensate for channels are saved in the class of model type seed_oss"),
        ("qwen2", "INFO", "are saved in the class of model type seed_oss"),
        ("qwen3", "WARNING", "serve elastic use only, and extraction refuses: bias compensation on qwen3"),
    ],
)
def test_where_compensating_biases_go_is_told(
    rank: Any, caplog: pytest.LogCaptureFixture, model_type: str, level: str, message: str
) -> None:
    with caplog.at_level(logging.INFO):
        rank(model_type, bias_compensation=True)
    (record,) = [record for record in caplog.records if "biases that compensate" in record.message]
    assert record.levelname == level
    assert message in record.message
    caplog.clear()
    rank(model_type)
    assert "biases" not in caplog.text
