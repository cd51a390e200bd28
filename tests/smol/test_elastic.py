"""SMOL on an elastic model: the factors follow the layers' sizes, and the router follows the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from elastic_models import random_elastic
from peft import get_peft_model
from torch import Tensor

from amoeba_plugin.smol import SmolConfig, SmolLinear


@pytest.mark.parametrize("combination", ["factors", "outputs"])
def test_adapter_equals_folding_it_into_the_prefix(
    base_model: Callable[..., Any], randomize: Callable[..., None], tokens: Tensor, combination: str
) -> None:
    elastic = random_elastic(base_model(num_attention_heads=8, num_key_value_heads=4, hidden_size=32))
    space = elastic.space
    config = SmolConfig(
        r=3,
        depths=list(space.depths),
        widths=[str(width) for width in space.widths],
        kept_layers={str(shape.depth): list(elastic.kept_layers(shape)) for shape in space},
        num_layers=4,
        num_experts=4,
        combination=combination,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    model = get_peft_model(elastic.model, config)
    randomize(model, only="smol_")
    model.eval()
    elastic.on_shape_change(model.set_shape)
    seen_sizes = set()
    for shape in space:
        elastic.set_shape(shape)
        assert model.shape == shape
        layers = [module for module in model.modules() if isinstance(module, SmolLinear)]
        assert len(layers) == 7 * shape.depth
        seen_sizes.update((layer.base_layer.active_out, layer.base_layer.active_in) for layer in layers)
        logits = model(tokens).logits
        with model.disable_adapter():
            assert not torch.allclose(model(tokens).logits, logits, atol=1e-2)
        for layer in layers:
            layer.base_layer.weight.data += layer.get_delta_weight("default")
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=1e-4)
        for layer in layers:
            layer.base_layer.weight.data -= layer.get_delta_weight("default")
    assert len(seen_sizes) > 7


@pytest.mark.parametrize("combination", ["factors", "outputs"])
def test_without_adapt_largest_the_whole_model_stays_the_base(
    smol_model: Callable[..., Any], tokens: Tensor, combination: str
) -> None:
    free, tied = (smol_model(combination=combination, adapt_largest=adapt) for adapt in (True, False))
    with free.disable_adapter():
        base = free(tokens).logits
    assert not torch.allclose(free(tokens).logits, base, atol=1e-2)
    assert torch.equal(tied(tokens).logits, base)
    assert not tied.routing().any()
    layer = next(module for module in tied.modules() if isinstance(module, SmolLinear))
    assert not layer.get_delta_weight("default").any()
    for shape in ("4x3/4", "3x1", "2x1/2"):
        for model in (free, tied):
            model.set_shape(shape)
        assert torch.equal(tied(tokens).logits, free(tokens).logits)
