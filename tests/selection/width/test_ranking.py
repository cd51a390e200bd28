"""Widths: orders against loops over channels, sizes against what each allocation promises."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.models.adapter import ChannelAxis, ChannelGroup, group_key
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import ActivationStats, collect_statistics
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.importance import Importance
from amoeba_plugin.selection.registry import importance_named
from amoeba_plugin.selection.width.allocation import global_prefix, nearest_size, other_share
from amoeba_plugin.selection.width.ranking import coupled_parameters, rank_widths, standardised, unit_cost
from amoeba_plugin.selection.width.task import WidthTask

TinyModel = Callable[..., PreTrainedModel]
Batches = Callable[..., list[dict[str, Tensor]]]
WIDTHS = [Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)]
SIZES = {"attention": 4, "mlp": 128}  # units of conftest's models
HEAD, QUERIES = 16, 2  # of conftest's models: a KV group is 2 heads of 16 channels


@pytest.fixture
def rank(tiny_model: TinyModel, random_batches: Batches) -> Callable[..., tuple[PreTrainedModel, WidthStrategy]]:
    def rank(model_type: str = "llama", **options: Any) -> tuple[PreTrainedModel, WidthStrategy]:
        model, adapter = tiny_model(model_type), architecture_for(model_type)
        stats = collect_statistics(model, adapter, random_batches(lengths=(12, 7)), progress=False)
        options = {"widths": WIDTHS, "importance": importance_named("flap")} | options
        return model, rank_widths(WidthTask(model, adapter, statistics=stats, **options))

    return rank


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


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("round_to", [1, 32, {"mlp": 8}, {"attention": 64, "mlp": 16}])
def test_widths_are_nested_whole_at_1_and_never_empty(rank: Any, allocation: str, round_to: Any) -> None:
    model, strategy = rank(allocation=allocation, round_to=round_to)
    assert list(strategy.units) == WIDTHS
    keys = [group_key(i, g) for i in range(4) for g in architecture_for("llama").channel_groups(model.config)]
    assert all(list(units) == keys for units in strategy.units.values())
    for key in keys:
        sizes = [strategy.units[width][key] for width in WIDTHS]
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


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "opt"])
@pytest.mark.parametrize("name", ["taylor", "taylor_vector", "group_magnitude"])
def test_group_importances_equal_loops_over_the_elements_of_units(
    tiny_model: TinyModel, random_batches: Batches, model_type: str, name: str
) -> None:
    model, adapter = tiny_model(model_type, layers=2, **EXTRA.get(model_type, {})), architecture_for(model_type)
    batches = random_batches(3, lengths=(12, 7))
    gradients = loss_gradients(model, coupled_parameters(model, adapter), batches, progress=False)
    strategy = rank_widths(WidthTask(model, adapter, importance_named(name), WIDTHS, gradients=gradients))
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
        rank_widths(WidthTask(model, architecture_for("llama"), importance_named("taylor"), WIDTHS))


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
    assert rank_widths(WidthTask(model, adapter, importance_named("magnitude"), WIDTHS)).mean_input == {}
    with pytest.raises(
        DataError, match=r"importance flap needs statistics of 0\.attention over 128 channels, there are none"
    ):
        rank_widths(WidthTask(model, adapter, importance_named("flap"), WIDTHS))
    with pytest.raises(DataError, match="bias_compensation needs statistics"):
        rank_widths(WidthTask(model, adapter, importance_named("magnitude"), WIDTHS, bias_compensation=True))
    wrong = {"0.attention": ActivationStats.empty(64)}
    with pytest.raises(DataError, match="there are 64 channels; collect them on this model"):
        rank_widths(WidthTask(model, adapter, importance_named("flap"), WIDTHS, wrong))


def test_scores_that_are_not_finite_are_refused(rank: Any) -> None:
    broken = Importance("broken", lambda stats, weight: torch.full((weight.shape[1],), float("nan")))
    with pytest.raises(DataError, match=r"importance broken of 0\.attention is NaN or infinite"):
        rank(importance=broken)


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
