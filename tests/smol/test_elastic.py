"""SMOL on an elastic model: the factors follow the layers' sizes, and the router follows the shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor

from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
from amoeba_plugin.elastic.linear import ElasticLinear
from amoeba_plugin.errors import AdapterError, ArtifactError
from amoeba_plugin.smol import SmolConfig, SmolLinear
from amoeba_plugin.smol.config import COMBINATIONS
from support.checkpoints import record_anew
from support.models import random_elastic


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


@settings(max_examples=30)
@given(
    st.integers(1, 9), st.integers(0, 9), st.integers(1, 11), st.integers(0, 11), st.integers(1, 3),
    st.sampled_from(COMBINATIONS),
)  # fmt: skip
def test_any_prefix_on_both_sides(
    into: int, more_in: int, out: int, more_out: int, parts: int, combination: str
) -> None:
    part = out + more_out  # a fused linear keeps a prefix of every part
    base = torch.nn.Sequential(ElasticLinear.convert(torch.nn.Linear(into + more_in, parts * part)))
    config = SmolConfig(
        r=2, widths=["1", "1/2"], target_modules=["0"], init_weights=False, combination=combination, num_experts=3
    )
    model = get_peft_model(base, config).eval()
    model.set_shape("1x1/2")
    layer = model.base_model.model[0]
    layer.base_layer.active_in = into
    layer.base_layer.active_rows = tuple(slice(index * part, index * part + out) for index in range(parts))
    x = torch.randn(3, into)
    whole = torch.cat([x, torch.zeros(3, more_in)], dim=1)  # a channel that is not there is one that is zero
    update = (whole @ layer.get_delta_weight("default").T).unflatten(1, (parts, part))[..., :out]
    torch.testing.assert_close(model(x), layer.base_layer(x) + update.flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ["1", "7/8"]}, r"asks for width 7/8, but the base model has .* widths \{1, 3/4, 1/2\}"),
        ({"depths": [4, 1]}, r"asks for depth 1, but the base model has depths \{4, 3, 2\}"),
    ],
)
def test_shapes_that_the_base_has_not(base_model: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    elastic = random_elastic(base_model(num_attention_heads=8, num_key_value_heads=4, hidden_size=32))
    with pytest.raises(AdapterError, match=message):
        attach_smol(elastic, SmolConfig(target_modules=["q_proj"], **fields))
    attach_smol(elastic, SmolConfig(target_modules=["q_proj"], widths=["1", "1/2"], depths=[4]))


def test_an_adapter_of_another_space_than_the_strategy(base_model: Callable[..., Any], tmp_path: Path) -> None:
    model = base_model(num_attention_heads=8, num_key_value_heads=4, hidden_size=32)
    model.save_pretrained(tmp_path / "base")
    elastic = random_elastic(model)
    peft_model = attach_smol(elastic, SmolConfig(target_modules=["q_proj"]))
    save_elastic(elastic, peft_model, tmp_path / "elastic", str(tmp_path / "base"))
    path = tmp_path / "elastic" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"widths": ["1", "3/4", "1/3"]}))
    record_anew(tmp_path / "elastic")
    with pytest.raises(ArtifactError, match=r"trained for .*\{1, 3/4, 1/3\}, but the strategy in .*\{1, 3/4, 1/2\}"):
        load_elastic(tmp_path / "elastic")


def test_a_lora_of_reordered_channels_is_not_written(base_model: Callable[..., Any], tmp_path: Path) -> None:
    elastic = random_elastic(base_model(num_attention_heads=8, num_key_value_heads=4, hidden_size=32))
    peft_model = attach_smol(elastic, SmolConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"would fit no checkpoint; .* --adapter separate`"):
        peft_model.to_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("combination", COMBINATIONS)
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
