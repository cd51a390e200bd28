"""Sizes split by measured loss: against brute force over every split, by zeroing what would be left out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import DepthStrategy, WidthStrategy
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import importance_named, objective_named, repair_named
from amoeba_plugin.selection.repair.collect import collect_moments
from amoeba_plugin.selection.repair.depth import fold_depths
from amoeba_plugin.selection.repair.moments import ChannelMoments
from amoeba_plugin.selection.repair.width import WidthRepair
from amoeba_plugin.selection.width.measured import FEW, measured_widths
from amoeba_plugin.selection.width.splits import MOST_SPLITS, Part, parts_of, splits, spread
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.selection.width.trials import Trials
from amoeba_plugin.testing.random_models import random_model
from support.architectures import CONFIGS

Batches = Callable[..., list[dict[str, Tensor]]]
WIDTHS = [Fraction(1), Fraction(3, 4), Fraction(1, 2)]
HEAD = 64 * 16 * 6  # parameters of a KV group of the tiny models: rows of q (2 heads), k, v; columns of o (2 heads)
NEURON = 3 * 64


def measured(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], trials: Trials | None = None, **options: Any
) -> WidthStrategy:
    adapter = architecture_for(model.config.model_type)
    stats = collect_statistics(model, adapter, batches, progress=False)
    fields = {"widths": WIDTHS, "statistics": stats} | options
    task = WidthTask(model, adapter, importance_named("magnitude"), **fields)
    return measured_widths(task, objective_named("loss"), batches, progress=False, trials=trials)[0]


def loss_of(
    model: PreTrainedModel, strategy: WidthStrategy, sizes: dict[str, int], batches: Any, anchors: Sequence[int] = ()
) -> float:
    """Zero the columns of what is left out, in the host's own model."""
    adapter, before = architecture_for(model.config.model_type), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for index, layer in enumerate(adapter.layers(model)):
            for group in adapter.channel_groups(model.config) if index not in anchors else []:
                gone = strategy.order[group_key(index, group)][sizes[group.name] :]
                group.consumer.weight(layer)[:, group.consumer.channels(gone)] = 0
    value = objective_named("loss").measure(model, batches).value
    model.load_state_dict(before)
    return value


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_the_best_of_all_splits_is_taken(model_type: str, tiny_model: Any, random_batches: Batches) -> None:
    model, batches = tiny_model(model_type), random_batches(lengths=(12, 7))
    strategy = measured(model, batches, round_to={"mlp": 8})
    most = {"attention": 4, "mlp": 128}
    for width in WIDTHS[1:]:
        budget = width * (4 * HEAD + 128 * NEURON)
        allowed = [
            {"attention": heads, "mlp": neurons}
            for heads, neurons in itertools.product(range(1, most["attention"] + 1), range(8, most["mlp"] + 1, 8))
            if abs(heads * HEAD + neurons * NEURON - budget) <= 4 * NEURON
        ]
        assert len(allowed) > 1
        losses = [loss_of(model, strategy, sizes, batches) for sizes in allowed]
        assert max(losses) - min(losses) > 1e-4
        most = allowed[losses.index(min(losses))]
        assert strategy.units[width] == {f"{layer}.{name}": size for layer in range(4) for name, size in most.items()}
    assert strategy.allocation == "measured"


def test_layers_that_are_no_anchors_have_the_best_split_that_makes_up_for_them(
    tiny_model: Any, random_batches: Batches
) -> None:
    model, batches, anchors, width = tiny_model("llama"), random_batches(lengths=(12, 7)), (0, 3), Fraction(3, 4)
    strategy = measured(model, batches, widths=[Fraction(1), width], round_to={"mlp": 8}, anchors=anchors)
    budget = Fraction(1, 2) * (4 * HEAD + 128 * NEURON)  # (3/4 * 4 - 2) / (4 - 2) of a layer
    allowed = [
        {"attention": heads, "mlp": neurons}
        for heads, neurons in itertools.product(range(1, 5), range(8, 129, 8))
        if abs(heads * HEAD + neurons * NEURON - budget) <= 4 * NEURON
    ]
    losses = [loss_of(model, strategy, sizes, batches, anchors) for sizes in allowed]
    best = allowed[losses.index(min(losses))]
    assert strategy.units[width] == {
        f"{layer}.{name}": whole if layer in anchors else best[name]
        for layer in range(4)
        for name, whole in {"attention": 4, "mlp": 128}.items()
    }
    with pytest.raises(RecipeError, match="width 1/2 is impossible with these anchor_layers"):
        measured(model, batches, anchors=anchors)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_with_repair_the_split_is_best_that_is_best_repaired(model_type: str, random_batches: Batches) -> None:
    """Against every split with its repaired weights in the host's own model, and zeros for what is left out."""
    model, batches, width = random_model(CONFIGS[model_type]), random_batches(3, rows=4), Fraction(1, 2)
    adapter = architecture_for(model_type)
    with ChannelMoments.of(1e9) as moments:
        runs = LayerRuns.of(model, adapter, batches)
        collect_moments(runs, moments, progress=False)
        repair = WidthRepair(repair_named("least_squares"), moments)
        trials = Trials(runs, objective_named("loss"), repair)
        strategy = measured(model, batches, widths=[Fraction(1), width], round_to={"mlp": 8}, trials=trials)
        losses: dict[tuple[int, int], float] = {}
        for sizes in splits(parts_of(model, adapter, {"mlp": 8}), width, {"attention": 4, "mlp": 64}):
            other = copy.deepcopy(model)
            for index, layer in enumerate(adapter.layers(other)):
                for group in adapter.channel_groups(other.config):
                    key = group_key(index, group)
                    order, units = strategy.order[key], sizes[group.name]
                    channels, weight = group.consumer.channels(order), group.consumer.weight(layer).detach()
                    repaired = repair.columns(key, group, weight[:, channels], order, [units])
                    kept = channels[: units * group.consumer.channels_per_unit]
                    weight.copy_(torch.zeros_like(weight).index_copy(1, kept, repaired.get(units, weight[:, kept])))
            losses[sizes["attention"], sizes["mlp"]] = objective_named("loss").measure(other, batches).value
    assert len(losses) > 1
    best = min(losses, key=lambda sizes: losses[sizes])
    found = {key.split(".")[1]: units for key, units in strategy.units[width].items()}
    assert (found["attention"], found["mlp"]) == best
    assert loss_of(model, strategy, found, batches) > losses[best]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_shape_of_a_total_is_the_best_of_all_depths_and_splits(model_type: str, random_batches: Batches) -> None:
    """Against every shape of that many parameters with its weights in the host's own model, by itself."""
    model, batches, total = random_model(CONFIGS[model_type]), random_batches(3, rows=4), Fraction(1, 2)
    adapter, objective = architecture_for(model_type), objective_named("loss")
    runs, layers = LayerRuns.of(model, adapter, batches), len(adapter.layers(model))
    depth = DepthStrategy({layers: tuple(range(layers)), layers - 1: (0, *range(2, layers))})
    folds = fold_depths(runs, depth, progress=False)
    assert bool(folds) == (model_type == "llama")
    with ChannelMoments.of(1e9) as moments:
        collect_moments(runs, moments, progress=False)
        repair = WidthRepair(repair_named("least_squares"), moments)
        task = WidthTask(
            model, adapter, importance_named("magnitude"), [Fraction(1), Fraction(3, 4)],
            collect_statistics(model, adapter, batches, progress=False), round_to={"mlp": 8}, totals=[total],
        )  # fmt: skip
        trials = Trials(runs, objective, repair, depth.kept, folds)
        strategy, shapes = measured_widths(task, objective, batches, progress=False, trials=trials)
        most = {key.split(".")[1]: units for key, units in strategy.units[Fraction(3, 4)].items()}
        losses: dict[tuple[float, int, int], float] = {}
        for count, kept in depth.kept.items():
            share = total * layers / Fraction(count)
            for sizes in spread(splits(parts_of(model, adapter, {"mlp": 8}), share, most), FEW):
                other = copy.deepcopy(model)
                for index, layer in enumerate(adapter.layers(other)):
                    for group in adapter.channel_groups(other.config):
                        key = group_key(index, group)
                        order, units = strategy.order[key], sizes[group.name]
                        channels, weight = group.consumer.channels(order), group.consumer.weight(layer).detach()
                        whole = folds.get(count, {}).get(key, weight)[:, channels]
                        left = channels[: units * group.consumer.channels_per_unit]
                        repaired = repair.columns(key, group, whole, order, [units]).get(units, whole[:, : len(left)])
                        weight.copy_(torch.zeros_like(weight).index_copy(1, left, repaired))
                adapter.set_layers(other, [adapter.layers(other)[index] for index in kept], kept, other.config)
                losses[count, sizes["attention"], sizes["mlp"]] = objective.measure(other, batches).value
    assert len({count for count, *_ in losses}) == 2
    best = min(losses, key=lambda shape: losses[shape])
    units = {key.split(".")[1]: units for key, units in strategy.units[shapes[total].width].items()}
    assert (shapes[total].depth, units["attention"], units["mlp"]) == best
    assert shapes[total].width * Fraction(shapes[total].depth) / layers == total
    assert all(most[name] >= units[name] for name in most)


def test_a_total_that_no_depth_has_is_refused(tiny_model: Any, random_batches: Batches) -> None:
    model, batches = tiny_model("llama", layers=4), random_batches()
    adapter, objective = architecture_for("llama"), objective_named("loss")
    trials = Trials(LayerRuns.of(model, adapter, batches), objective, None, {2: (0, 1)})
    with pytest.raises(RecipeError, match="total 3/4 is impossible: the deepest subnet has 2 layers"):
        measured(model, batches, totals=[Fraction(3, 4)], trials=trials)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3_moe", "opt"])
def test_the_model_is_as_it_was_to_the_last_bit(model_type: str, random_batches: Batches) -> None:
    model = random_model(CONFIGS[model_type])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    strategy = measured(model, random_batches(lengths=(9,)))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert any(order.tolist() != sorted(order.tolist()) for order in strategy.order.values())
    assert len({tuple(units.values()) for units in strategy.units.values()}) == len(WIDTHS)


@given(st.data())
def test_splits_have_the_share_and_lie_in_what_wider_widths_keep(data: st.DataObject) -> None:
    parts = []
    for name in ("attention", "mlp"):
        units = data.draw(st.integers(1, 40))
        parts.append(Part(name, units, data.draw(st.integers(1, units)), data.draw(st.integers(1, 50))))
    parts.sort(key=lambda part: part.cost * part.step, reverse=True)
    whole, most = sum(part.cost * part.units for part in parts), {part.name: part.units for part in parts}
    widths = data.draw(st.lists(st.fractions(Fraction(1, 10), 1, max_denominator=16), min_size=1, max_size=3))
    for share in sorted(widths, reverse=True):
        found = splits(parts, share, most)
        assert 1 <= len(found) <= MOST_SPLITS
        distances = [abs(sum(part.cost * sizes[part.name] for part in parts) - share * whole) for sizes in found]
        for part in parts:
            possible = {*range(part.step, part.units + 1, part.step), part.units}
            assert all(sizes[part.name] in possible and sizes[part.name] <= most[part.name] for sizes in found)
        if len(found) > 1:
            assert max(distances) <= max(Fraction(parts[-1].cost * parts[-1].step, 2), min(distances))
        most = found[data.draw(st.integers(0, len(found) - 1))]


def test_of_many_splits_some_at_even_distances_are_tried() -> None:
    parts = [Part("attention", 64, 1, 100), Part("mlp", 6400, 1, 1)]
    found = splits(parts, Fraction(1, 2), {"attention": 64, "mlp": 6400})
    assert len(found) == MOST_SPLITS
    assert (found[0]["attention"], found[-1]["attention"]) == (63, 1)
    assert all(100 * sizes["attention"] + sizes["mlp"] == 6400 for sizes in found)


def test_sizes_that_a_stock_class_holds_are_taken_where_there_are_any() -> None:
    parts = [Part("attention", 8, 1, 10), Part("mlp", 80, 1, 1)]
    most = {"attention": 8, "mlp": 80}
    even = splits(parts, Fraction(1, 2), most, lambda sizes: sizes["attention"] % 2 == 0)
    assert [sizes["attention"] for sizes in even] == [6, 4, 2]
    assert splits(parts, Fraction(1, 2), most, lambda _: False) == splits(parts, Fraction(1, 2), most)


def test_heads_divide_the_hidden_size_where_a_class_wants_it(random_batches: Batches) -> None:
    config = CONFIGS["gemma2"] | {"hidden_size": 64, "num_key_value_heads": 8}
    widths = [Fraction(count, 16) for count in range(15, 3, -1)]
    strategy = measured(random_model(config), random_batches(lengths=(9,)), widths=widths)
    heads = [strategy.units[width]["0.attention"] for width in widths]
    assert set(heads) <= {8, 4, 2, 1}
    assert len(set(heads)) > 1


def test_the_whole_stays_whole_though_something_smaller_is_as_near() -> None:
    parts = [Part("attention", 9, 8, 1), Part("mlp", 64, 8, 1)]
    assert splits(parts, Fraction(1), {"attention": 9, "mlp": 64}) == [{"attention": 9, "mlp": 64}]


def test_impossible_widths_are_refused_before_anything_is_measured(tiny_model: Any, random_batches: Batches) -> None:
    with pytest.raises(RecipeError, match="widths 2 are impossible"):
        measured(tiny_model("llama"), random_batches(), widths=[Fraction(2)])
