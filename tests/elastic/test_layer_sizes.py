"""Sizes of layers, read off a strategy once: against it by hand, and against models built of what they say."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.elastic.subnet_config import is_per_layer, weightless
from amoeba_plugin.elastic.subnet_plan import SubnetPlan
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.shape import SubnetShape
from support.models import SIZES

LAYERS, KV_GROUPS, NEURONS = 4, SIZES["num_key_value_heads"], SIZES["intermediate_size"]
NARROW = Fraction(1, 2)
PARTS = st.sampled_from([None, "attention", "mlp"])  # what a kept layer has lost


def config() -> PretrainedConfig:
    return AutoConfig.for_model("llama", **SIZES, num_hidden_layers=LAYERS)


@st.composite
def strategies(draw: st.DrawFn) -> tuple[dict[int, str | None], dict[str, int], SubnetStrategy]:
    """Draw the layers kept and what they lost, units of every group at the narrow width, and the strategy of both."""
    kept = {index: draw(PARTS) for index in sorted(draw(st.sets(st.integers(0, LAYERS - 1), min_size=2)))}
    if all(part == "mlp" for part in kept.values()):
        kept[min(kept)] = None  # such a subnet is refused
    units = {f"{layer}.attention": draw(st.integers(1, KV_GROUPS)) for layer in range(LAYERS)}
    units |= {f"{layer}.mlp": draw(st.integers(1, NEURONS)) for layer in range(LAYERS)}
    lost = {layer: part for layer, part in kept.items() if part is not None}
    depth = len(kept) - len(lost) / 2
    whole = tuple(range(LAYERS))
    depths = DepthStrategy({LAYERS: whole, depth: tuple(kept)}, lost={depth: lost} if lost else {})
    widths = WidthStrategy({Fraction(1): {}, NARROW: units}, bias_compensation=draw(st.booleans()))
    return kept, units, SubnetStrategy(depths, widths, "nobody's")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(strategies())
def test_every_layer_of_the_class_has_the_sizes_that_the_strategy_gives_it(drawn: Any) -> None:
    kept, units, strategy = drawn
    plan = SubnetPlan(architecture_for("llama"), config(), strategy)
    shape = SubnetShape(len(kept) - sum(part is not None for part in kept.values()) / 2, NARROW)
    sizes = plan.sizes(shape)
    stated = plan.configured(sizes)
    assert is_per_layer(stated) == (not sizes.alike)
    layers = weightless(stated).model.layers
    assert len(layers) == len(kept)
    for (index, part), layer in zip(kept.items(), layers, strict=True):
        linears = {path: module for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        heads, neurons = units[f"{index}.attention"], units[f"{index}.mlp"]
        expected = {"self_attn.k_proj": (64, heads * 16), "self_attn.o_proj": (heads * 32, 64)}
        expected |= {"mlp.up_proj": (64, neurons), "mlp.down_proj": (neurons, 64)}
        gone = {None: "-", "attention": "self_attn", "mlp": "mlp"}[part]
        for path, size in expected.items():
            assert (path in linears) == (not path.startswith(gone)), f"layer {index}: {path}"
            if path in linears:
                assert (linears[path].in_features, linears[path].out_features) == size, f"layer {index}: {path}"
                ends = path.endswith(("o_proj", "down_proj"))
                assert not ends or (linears[path].bias is not None) == strategy.width.bias_compensation, path


@settings(max_examples=60, deadline=None, derandomize=True)
@given(strategies())
def test_padded_layers_are_a_stock_class_of_the_largest(drawn: Any) -> None:
    kept, units, strategy = drawn
    plan = SubnetPlan(architecture_for("llama"), config(), strategy)
    sizes = plan.sizes(SubnetShape(len(kept) - sum(part is not None for part in kept.values()) / 2, NARROW))
    padded = sizes.padded
    assert padded.alike
    assert padded.padded == padded
    assert (
        padded.largest
        == sizes.largest
        == {part: max(units[f"{index}.{part}"] for index in kept) for part in ("attention", "mlp")}
    )
    stated = plan.configured(padded)
    assert not is_per_layer(stated)
    assert (stated.num_hidden_layers, stated.num_key_value_heads) == (len(kept), sizes.largest["attention"])


def test_the_whole_model_is_alike_and_unbiased() -> None:
    strategy = SubnetStrategy(DepthStrategy.whole(LAYERS), WidthStrategy({Fraction(1): {}}, bias_compensation=True), "")
    sizes = SubnetPlan(architecture_for("llama"), config(), strategy).sizes(SubnetShape(LAYERS, Fraction(1)))
    assert sizes == LayerSizes((0, 1, 2, 3), [{"attention": KV_GROUPS, "mlp": NEURONS}] * LAYERS)
    assert torch.device("meta") == weightless(config()).device
