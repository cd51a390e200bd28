"""Some stock class holds every shape of the grids of LLaMA-2-7B and Llama-3-8B; scaled down, each is reloaded."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.elastic.subnet_config import weightless
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.width.allocation import kept_units
from support.strategies import random_strategy

TinyModel = Callable[..., PreTrainedModel]
WHOLE = {
    "llama2-7b": {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
    "llama3-8b": {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0},
}


def whole_config(name: str) -> PretrainedConfig:
    return AutoConfig.for_model("llama", num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, **WHOLE[name])


@pytest.mark.parametrize("parts", [8, 16])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_stock_class_holds_every_shape_of_the_grid(name: str, parts: int, tmp_path: Path) -> None:
    """At every depth by configuration; at every width also built, one layer without memory."""
    whole = whole_config(name)
    adapter = architecture_for("llama")
    groups = adapter.channel_groups(whole)
    classes = set()
    for share in (Fraction(part, parts) for part in range(1, parts + 1)):
        units = kept_units(groups, share, {"attention": 1, "mlp": 128})
        heads = units["attention"] * 32 // WHOLE[name]["num_key_value_heads"]
        for depth in range(16, 33):
            config = adapter.subnet_config(whole, range(depth), units)
            again = type(config).from_dict(config.to_dict())  # the rules of the class are applied anew
            assert (again.num_hidden_layers, again.num_attention_heads, again.head_dim) == (depth, heads, 128)
            assert again.num_key_value_heads == units["attention"]
            assert again.intermediate_size == units["mlp"]
            assert again.rope_parameters == whole.rope_parameters
        classes.add(type(config).__name__)
        adapter.subnet_config(whole, range(1), units).save_pretrained(tmp_path)
        layer = weightless(AutoConfig.from_pretrained(tmp_path)).model.layers[0]
        assert layer.self_attn.q_proj.weight.shape == (heads * 128, 4096)
        assert layer.self_attn.k_proj.weight.shape == (units["attention"] * 128, 4096)
        assert layer.self_attn.o_proj.weight.shape == (4096, heads * 128)
        assert layer.mlp.down_proj.weight.shape == (4096, units["mlp"])
    assert classes == {"LlamaConfig", "MistralConfig"}  # 28 heads do not divide 4096, 16 do


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_scaled_down_every_width_reloads_and_computes_the_same(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    """As many heads and KV groups as the model has, on a sixty-fourth of its channels."""
    sizes = {"hidden_size": 64, "num_attention_heads": 32, "head_dim": 4, "intermediate_size": 172}
    model = tiny_model("llama", layers=2, **sizes, num_key_value_heads=WHOLE[name]["num_key_value_heads"])
    adapter = architecture_for("llama")
    groups = adapter.channel_groups(model.config)
    shares = [Fraction(part, 8) for part in range(8, 0, -1)]
    base = random_strategy(model)
    units = {
        share: {key: kept_units(groups, share, 1)[key.partition(".")[2]] for key in base.width.order}
        for share in shares
    }
    strategy = SubnetStrategy(
        DepthStrategy({2: (0, 1), 1: (1,)}), WidthStrategy(units, base.width.order), base.fingerprint
    )
    elastic = ElasticModel(model, strategy)
    tokens = torch.arange(3, 15)[None]
    for share in shares:
        shape = f"{2 if share.numerator % 2 else 1}x{share}"
        with elastic.active(shape), torch.no_grad():
            expected = elastic.model(tokens, use_cache=False).logits
        extract(elastic, shape).save_pretrained(tmp_path / shape.replace("/", "_"))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / shape.replace("/", "_"))
        assert reloaded.config.num_key_value_heads == units[share]["0.attention"]
        with torch.no_grad():
            torch.testing.assert_close(reloaded(tokens).logits, expected, atol=1e-4, rtol=0)
