"""Widths: orders against loops over channels, sizes against what each allocation promises."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.architecture import group_key
from amoeba_plugin.calibration import ActivationStats, collect_statistics
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.importance import Importance
from amoeba_plugin.plugins import architecture_for, importance_named
from amoeba_plugin.strategy import WidthStrategy
from amoeba_plugin.width import global_prefix, nearest_size, rank_group, rank_widths, standardised

TinyModel = Callable[..., PreTrainedModel]
Batches = Callable[..., list[dict[str, Tensor]]]
WIDTHS = [Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)]
HEAD, QUERIES = 16, 2  # of conftest's models: a KV group is 2 heads of 16 channels


@pytest.fixture
def rank(tiny_model: TinyModel, random_batches: Batches) -> Callable[..., tuple[PreTrainedModel, WidthStrategy]]:
    def rank(model_type: str = "llama", **options: Any) -> tuple[PreTrainedModel, WidthStrategy]:
        model, adapter = tiny_model(model_type), architecture_for(model_type)
        stats = collect_statistics(model, adapter, random_batches(lengths=(12, 7)), progress=False)
        options = {"widths": WIDTHS, "importance": importance_named("flap")} | options
        return model, rank_widths(model, adapter, stats, **options)

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


def test_the_cost_of_a_kv_group_is_the_paper_s(tiny_model: TinyModel) -> None:
    model, adapter = tiny_model("llama"), architecture_for("llama")
    attention, mlp = adapter.channel_groups(model.config)
    magnitude, layer = importance_named("magnitude"), model.model.layers[0]
    ratio = Fraction(
        rank_group(layer, "0.attention", attention, None, magnitude).cost,
        rank_group(layer, "0.mlp", mlp, None, magnitude).cost,
    )
    assert ratio == Fraction((2 * QUERIES + 2) * HEAD, 3)  # (2g + 2) d_h / 3 neurons


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
    assert rank_widths(model, adapter, {}, widths=WIDTHS, importance=importance_named("magnitude")).mean_input == {}
    with pytest.raises(
        DataError, match=r"importance flap needs statistics of 0\.attention over 128 channels, there are none"
    ):
        rank_widths(model, adapter, {}, widths=WIDTHS, importance=importance_named("flap"))
    with pytest.raises(DataError, match="bias_compensation needs statistics"):
        rank_widths(model, adapter, {}, widths=WIDTHS, importance=importance_named("magnitude"), bias_compensation=True)
    wrong = {"0.attention": ActivationStats.empty(64)}
    with pytest.raises(DataError, match="there are 64 channels; collect them on this model"):
        rank_widths(model, adapter, wrong, widths=WIDTHS, importance=importance_named("flap"))


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
