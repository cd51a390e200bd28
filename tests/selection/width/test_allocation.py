"""Widths: sizes against what each allocation promises."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.adapter import ChannelAxis, ChannelGroup, group_key
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.importance import Importance
from amoeba_plugin.selection.width.allocation import global_prefix, nearest_size, other_share
from amoeba_plugin.selection.width.ranking import unit_cost
from support.strategies import FINE_WIDTHS

SIZES = {"attention": 4, "mlp": 128}  # units of the tiny models
HEAD, QUERIES = 16, 2  # of the tiny models: a KV group is 2 heads of 16 channels


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("round_to", [1, 32, {"mlp": 8}, {"attention": 64, "mlp": 16}])
def test_widths_are_nested_whole_at_1_and_never_empty(rank: Any, allocation: str, round_to: Any) -> None:
    model, strategy = rank(allocation=allocation, round_to=round_to)
    assert list(strategy.units) == FINE_WIDTHS
    keys = [group_key(i, g) for i in range(4) for g in architecture_for("llama").channel_groups(model.config)]
    assert all(list(units) == keys for units in strategy.units.values())
    for key in keys:
        sizes = [strategy.units[width][key] for width in FINE_WIDTHS]
        assert sizes[0] == len(strategy.order[key])
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] >= 1
    assert strategy.allocation == allocation


def test_uniform_keeps_the_share_in_every_layer(rank: Any) -> None:
    _, strategy = rank()
    wanted = {  # of 4 KV groups and 128 neurons; 3.5 groups become 4
        Fraction(1): (4, 128),
        Fraction(7, 8): (4, 112),
        Fraction(3, 4): (3, 96),
        Fraction(1, 2): (2, 64),
        Fraction(1, 4): (1, 32),
    }
    for width, (groups, neurons) in wanted.items():
        for layer in range(4):
            assert strategy.units[width][f"{layer}.attention"] == groups
            assert strategy.units[width][f"{layer}.mlp"] == neurons


def test_rounding_counts_the_consumer_s_channels(rank: Any) -> None:
    _, strategy = rank(round_to={"attention": 64, "mlp": 48}, widths=[Fraction(1), Fraction(3, 4), Fraction(1, 2)])
    sizes = [tuple(strategy.units[width][f"0.{name}"] for name in ("attention", "mlp")) for width in strategy.units]
    # 64 channels are 2 KV groups; 3 of 4 groups lie between 2 and 4, the larger wins. Whole is whole, though 128 is no
    # multiple of 48
    assert sizes == [(4, 128), (4, 96), (2, 48)]


def parameters_kept(model: PreTrainedModel, units: dict[str, int]) -> int:
    """Count by slicing shapes: rows of producers, columns of consumers; hidden is 64."""
    total = 0
    for index in range(len(model.model.layers)):
        groups, neurons = units[f"{index}.attention"], units[f"{index}.mlp"]
        total += 64 * HEAD * groups * (QUERIES + 1 + 1 + QUERIES) + 3 * 64 * neurons
    return total


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_global_keeps_the_share_of_parameters_within_one_unit(rank: Any, model_type: str) -> None:
    model, strategy = rank(model_type, allocation="global")
    whole = parameters_kept(model, strategy.units[Fraction(1)])
    unit = 64 * HEAD * (2 * QUERIES + 2)
    for width, units in strategy.units.items():
        assert abs(parameters_kept(model, units) - width * whole) <= Fraction(unit, 2)
    sizes = {strategy.units[Fraction(1, 2)][f"{layer}.mlp"] for layer in range(4)}
    assert len(sizes) > 1  # layers differ


LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("fields", "neurons"),
    [  # in units of a head's d_h: 4/3 for MHA, (2g + 2)/3 for a KV group of g query heads
        (LLAMA, Fraction(512, 3)),
        (LLAMA | {"num_key_value_heads": 8}, Fraction(1280, 3)),
        ({**LLAMA, "hidden_size": 2048, "num_key_value_heads": 8, "head_dim": 64}, Fraction(640, 3)),
        ({**LLAMA, "hidden_size": 2048, "num_key_value_heads": 4, "head_dim": 64}, Fraction(384)),
        (
            {**LLAMA, "model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2},
            Fraction(1024, 3),
        ),
        (
            {**LLAMA, "model_type": "qwen2", "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2},
            Fraction(1792, 3),
        ),
    ],
)
def test_the_cost_of_a_head_is_the_paper_s(fields: dict[str, Any], neurons: Fraction) -> None:
    config = AutoConfig.for_model(**fields, num_hidden_layers=1, vocab_size=8, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = architecture_for(config.model_type)
    attention, mlp = adapter.channel_groups(config)
    layer = adapter.layers(model)[0]
    assert Fraction(unit_cost(layer, attention), unit_cost(layer, mlp)) == neurons
    if config.model_type == "llama":  # a query head alone, its keys and values kept: 2 d_h / 3
        head_dim = layer.self_attn.head_dim
        heads = ChannelGroup(
            "query",
            config.num_attention_heads,
            (ChannelAxis("self_attn.q_proj", head_dim),),
            ChannelAxis("self_attn.o_proj", head_dim),
        )
        assert Fraction(unit_cost(layer, heads), unit_cost(layer, mlp)) == Fraction(2 * head_dim, 3)
        plain = ChannelGroup("plain", 64, (ChannelAxis("mlp.up_proj", 1),), ChannelAxis("mlp.down_proj", 1))  # no gate
        assert Fraction(unit_cost(layer, attention), unit_cost(layer, plain)) == neurons * Fraction(3, 2)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_anchors_stay_whole_and_the_others_make_up_for_them(rank: Any, allocation: str) -> None:
    model, strategy = rank(allocation=allocation, anchors=[0, 3], widths=[Fraction(1), Fraction(7, 8), Fraction(5, 8)])
    whole = parameters_kept(model, strategy.units[Fraction(1)])
    for width, units in strategy.units.items():
        assert all(units[f"{layer}.{group}"] == size for layer in (0, 3) for group, size in SIZES.items())
        assert abs(parameters_kept(model, units) - width * whole) <= 64 * HEAD * (2 * QUERIES + 2)
    assert all(strategy.units[Fraction(5, 8)][f"{layer}.mlp"] < 128 for layer in (1, 2))
    if allocation == "uniform":  # x = (r L - A) / (L - A) = (5/8 * 4 - 2) / 2
        assert {strategy.units[Fraction(5, 8)][f"{layer}.mlp"] for layer in (1, 2)} == {32}
        assert {strategy.units[Fraction(5, 8)][f"{layer}.attention"] for layer in (1, 2)} == {1}


def test_elms_own_example_of_anchors() -> None:
    share = other_share(Fraction(1, 2), Fraction(6, 32))
    assert share == Fraction(10, 26)  # 38.5 %
    assert nearest_size(32, share, 1) == 12
    assert other_share(Fraction(1), Fraction(6, 32)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": [4]}, r"anchor_layers \[4\] are impossible: the model has layers 0\.\.3"),
        ({"anchors": range(4)}, "one of them at least must shrink"),
        ({"anchors": [0, 1]}, "width 1/2 is impossible with these anchor_layers: they alone are 0.5 of the whole"),
        ({"anchors": [0, 1], "allocation": "global"}, "width 1/2 is impossible with these anchor_layers"),
    ],
)
def test_impossible_anchors_are_refused(rank: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rank(**options)


def test_a_layer_that_would_lose_everything_keeps_one_unit_and_is_named(
    rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, strategy = rank(widths=[Fraction(1), Fraction(1, 10)])
    assert "width 1/10 of 4 attention units is less than half a unit; every layer keeps one" in caplog.text
    assert caplog.text.count("less than half a unit") == 1
    assert {strategy.units[Fraction(1, 10)][f"{layer}.attention"] for layer in range(4)} == {1}
    caplog.clear()
    # heads that no neuron is worse than: the threshold alone would take all of them
    poor = Importance(
        "poor", lambda stats, weight: torch.arange(weight.shape[1]) ** (1.0 if len(stats.mean) == 128 else 1)
    )
    with caplog.at_level(logging.WARNING):
        _, strategy = rank(allocation="global", importance=poor, widths=[Fraction(1), Fraction(1, 50)])
    assert "width 1/50: the threshold would leave nothing of 0.attention, " in caplog.text
    assert all(count >= 1 for count in strategy.units[Fraction(1, 50)].values())


@given(st.data())
def test_the_global_prefix_keeps_the_best_units_at_the_nearest_cost(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    costs = [data.draw(st.integers(1, 40)) for _ in sizes]
    scores = [torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))).double() for n in sizes]
    total = sum(n * cost for n, cost in zip(sizes, costs, strict=True))
    before = [1] * len(sizes)
    for share in (Fraction(1, 8), Fraction(1, 2), Fraction(3, 4), Fraction(1)):
        counts = global_prefix(scores, costs, share)
        assert all(1 <= count <= n for count, n in zip(counts, sizes, strict=True))
        assert all(now >= then for now, then in zip(counts, before, strict=True))  # nested
        before = counts
        kept = sum(count * cost for count, cost in zip(counts, costs, strict=True))
        assert abs(kept - share * total) <= max(Fraction(max(costs), 2), sum(costs) - share * total)
        # no unit that had to earn its place is worse than one left out
        ranked = [each.sort(descending=True).values for each in scores]
        earned = [score for each, count in zip(ranked, counts, strict=True) for score in each[1:count].tolist()]
        left = [score for each, count in zip(ranked, counts, strict=True) for score in each[count:].tolist()]
        assert not earned or not left or min(earned) >= max(left)


@given(st.integers(1, 300), st.fractions(Fraction(1, 50), 1), st.integers(1, 40))
def test_the_nearest_size_is_the_nearest_multiple(units: int, share: Fraction, step: int) -> None:
    size = nearest_size(units, share, step)
    if share == 1:
        assert size == units
        return
    multiples = range(0, units + 1, step)
    assert size in multiples
    nearest = min(abs(multiple - share * units) for multiple in multiples)
    assert abs(size - share * units) == nearest or (size, step) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": []}, "widths are empty"),
        ({"widths": [Fraction(0), Fraction(1)]}, r"widths 0 are impossible: a share of channels lies in \(0, 1\]"),
        ({"widths": [Fraction(9, 8)]}, "widths 9/8 are impossible"),
        ({"allocation": "fair"}, "allocation 'fair' does not exist; take uniform or global"),
        ({"round_to": {"heads": 8}}, "round_to names heads; this model's groups are attention, mlp"),
        ({"round_to": 0}, "round_to 0 for attention is impossible"),
        (
            {"round_to": 48},
            "width 1/4 of attention is 32 of 128 channels, of which round_to leaves nothing; sizes possible are 96",
        ),
        ({"round_to": 256}, "round_to 256 for attention cannot be met: its 128 channels go in units of 32"),
        (
            {"round_to": {"mlp": 64}, "widths": [Fraction(1, 8)]},
            "width 1/8 of mlp is 16 of 128 channels, .* leaves nothing; sizes possible are 64, 128 channels",
        ),
    ],
)
def test_impossible_widths_are_refused(rank: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rank(**options)


def test_widths_that_rounding_makes_one_are_told(rank: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rank(round_to={"mlp": 64}, widths=[Fraction(1), Fraction(7, 8)])
    assert "widths 1 and 7/8 keep the same units" in caplog.text
