"""Layers of different sizes: a per-layer class that needs nothing but transformers, or zeros that fit a stock class."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.subnet_config import per_layer_class
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.modeling_per_layer import PerLayerSizes
from amoeba_plugin.testing.random_models import attach_random_smol
from support.models import logits, random_tokens
from support.strategies import random_strategy, uneven_strategy

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TinyModel = Callable[..., PreTrainedModel]
SHAPE = "3x3/4"
CASES = [
    ("llama", False, "PerLayerLlamaForCausalLM", "MistralForCausalLM"),
    ("llama", True, "PerLayerSeedOssForCausalLM", "SeedOssForCausalLM"),
    ("mistral", False, "PerLayerMistralForCausalLM", "MistralForCausalLM"),
    ("qwen2", False, "PerLayerQwen2ForCausalLM", "Qwen2ForCausalLM"),
    ("qwen2", True, "PerLayerSeedOssForCausalLM", "SeedOssForCausalLM"),
    ("qwen3", False, "PerLayerQwen3ForCausalLM", "Qwen3ForCausalLM"),
    ("phi3", False, "PerLayerPhi3ForCausalLM", "Phi3ForCausalLM"),
    ("mixtral", False, "PerLayerMixtralForCausalLM", "MixtralForCausalLM"),
    ("qwen3_moe", False, "PerLayerQwen3MoeForCausalLM", "Qwen3MoeForCausalLM"),
]

RELOAD = """
import sys, torch
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"amoeba_plugin", "llmcompressor"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
tokens, found = load_file(root / "tokens.safetensors")["tokens"], {}
for directory in sorted(path for path in root.iterdir() if path.is_dir()):
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, trust_remote_code="per_layer" in directory.name)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    cache, steps = None, []
    with torch.no_grad():
        found[directory.name] = model.eval()(tokens).logits
        for position in range(tokens.shape[1]):
            step = model(tokens[:, position:position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
        model.set_attn_implementation("eager")
        found[directory.name + ".eager"] = model(tokens).logits
    found[directory.name + ".cached"] = torch.cat(steps, 1)
save_file(found, root / "found.safetensors")
"""


@pytest.fixture
def tokens() -> Tensor:
    return random_tokens(positions=10)


def uneven_elastic(model: PreTrainedModel, bias_compensation: bool = False) -> ElasticModel:
    """Elastic with layers of different sizes and a SMOL adapter whose every parameter is random."""
    elastic = ElasticModel(model, uneven_strategy(model, bias_compensation))
    attach_random_smol(elastic)
    return elastic


def test_elastic_equals_per_layer_equals_padded_equals_reloaded(
    tiny_model: TinyModel, tokens: Tensor, tmp_path: Path
) -> None:
    expected = {}
    for model_type, biased, per_layer, stock in CASES:
        elastic = uneven_elastic(tiny_model(model_type, **EXPERTS if "moe" in model_type else {}), biased)
        with elastic.active(SHAPE):
            reference = logits(elastic.model, tokens)
        for name, subnet, class_name in (
            ("per_layer", extract(elastic, SHAPE), per_layer),
            ("padded", extract(elastic, SHAPE, portable=True), stock),
        ):
            assert type(subnet).__name__ == class_name
            torch.testing.assert_close(logits(subnet, tokens), reference, atol=1e-4, rtol=0)
            expected[f"{model_type}-{biased}-{name}"] = reference
            subnet.save_pretrained(tmp_path / f"{model_type}-{biased}-{name}")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=300, env=environment)
    found = load_file(tmp_path / "found.safetensors")
    assert len(found) == 3 * len(expected) == 6 * len(CASES)
    for name, reference in expected.items():
        for suffix in ("", ".cached", ".eager"):
            torch.testing.assert_close(found[name + suffix], reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gpt_neox", {}),
        ("granite", {}),
        ("olmo2", {}),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
        ("smollm3", {}),
    ],
)
def test_other_families_reload_with_their_own_sizes(
    tiny_model: TinyModel, tokens: Tensor, tmp_path: Path, model_type: str, sizes: dict[str, int]
) -> None:
    model = tiny_model(model_type, **sizes)
    elastic = ElasticModel(model, uneven_strategy(model))
    with elastic.active("3x1/2"):
        reference = logits(elastic.model, tokens)
    extract(elastic, "3x1/2").save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert reloaded.config.per_layer_attributes
    torch.testing.assert_close(logits(reloaded, tokens), reference, atol=1e-4, rtol=0)
    reloaded.set_attn_implementation("eager")
    torch.testing.assert_close(logits(reloaded, tokens), reference, atol=1e-4, rtol=0)


def test_every_layer_has_the_sizes_that_its_configuration_states(tiny_model: TinyModel, tmp_path: Path) -> None:
    elastic = uneven_elastic(tiny_model("llama"))
    extract(elastic, SHAPE).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert sum(parameter.numel() for parameter in model.parameters()) < sum(
        parameter.numel() for parameter in extract(elastic, SHAPE, portable=True).parameters()
    )
    kept = elastic.kept_layers(elastic.space.require(SHAPE))
    units = elastic.strategy.width.units[Fraction(3, 4)]
    for position, (layer, index) in enumerate(zip(model.model.layers, kept, strict=True)):
        stated = config.per_layer_config[position]
        assert stated.num_key_value_heads == units[f"{index}.attention"]
        assert stated.num_attention_heads == 2 * units[f"{index}.attention"]
        assert stated.intermediate_size == units[f"{index}.mlp"]
        assert layer.self_attn.layer_idx == position
        assert layer.self_attn.q_proj.weight.shape == (16 * stated.num_attention_heads, 64)
        assert layer.self_attn.o_proj.weight.shape == (64, 16 * stated.num_attention_heads)
        assert layer.mlp.down_proj.weight.shape == (64, stated.intermediate_size)


def test_a_padded_channel_is_zero_in_every_activation(tiny_model: TinyModel, tokens: Tensor) -> None:
    elastic = uneven_elastic(tiny_model("qwen2"))  # it has biases on q, k and v
    subnet = extract(elastic, SHAPE, portable=True)
    seen = []
    for index, layer in zip(
        elastic.kept_layers(elastic.space.require(SHAPE)), elastic.adapter.layers(subnet), strict=True
    ):
        for name, path, channels in (("attention", "self_attn.o_proj", 32), ("mlp", "mlp.down_proj", 1)):
            kept = channels * elastic.strategy.width.units[Fraction(3, 4)][f"{index}.{name}"]

            def check(_module: nn.Module, inputs: tuple[Tensor], kept: int = kept) -> None:
                assert not inputs[0][..., kept:].any()
                assert inputs[0][..., :kept].all()
                seen.append(inputs[0].shape[-1] > kept)

            layer.get_submodule(path).register_forward_pre_hook(check)
    logits(subnet, tokens)
    assert len(seen) == 6
    assert any(seen)


def test_the_elastic_model_keeps_its_sizes_after_padding(tiny_model: TinyModel, tokens: Tensor) -> None:
    elastic = uneven_elastic(tiny_model("llama"))
    with elastic.active(SHAPE):
        before = logits(elastic.model, tokens)
        extract(elastic, SHAPE, portable=True)
        assert torch.equal(logits(elastic.model, tokens), before)


def test_layers_of_one_size_stay_a_stock_class(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    elastic = ElasticModel(model, random_strategy(model))
    for portable in (False, True):
        assert type(extract(elastic, SHAPE, portable)).__name__ == "MistralForCausalLM"


def test_a_class_without_a_per_layer_sibling_is_refused_with_the_way_out() -> None:
    with pytest.raises(ArchitectureError, match="--portable"):
        per_layer_class(AutoConfig.for_model("gpt2"))


def test_experts_run_as_those_of_the_stock_class_do(tiny_model: TinyModel) -> None:
    """Contract: transformers asks a class whether the implementation of its experts can be chosen."""
    can = {each.__name__: each._can_set_experts_implementation() for each in PerLayerSizes.__subclasses__()}
    assert sorted(name for name, yes in can.items() if yes) == [
        "PerLayerMixtralForCausalLM",
        "PerLayerQwen3MoeForCausalLM",
    ]
    model = tiny_model("mixtral")
    elastic = ElasticModel(model, uneven_strategy(model))
    subnet = extract(elastic, SHAPE)
    assert subnet.config._experts_implementation == model.config._experts_implementation != "eager"
    subnet.set_experts_implementation("eager")
    assert subnet.model.layers[1].mlp.experts.config._experts_implementation == "eager"


def test_attention_runs_as_that_of_the_stock_class_does(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract: transformers looks for words in a class's file to tell whether its attention can be chosen."""
    assert all(each._can_set_attn_implementation() for each in PerLayerSizes.__subclasses__())
    model = tiny_model("llama")
    subnet = extract(ElasticModel(model, uneven_strategy(model)), SHAPE)
    assert subnet.config._attn_implementation == model.config._attn_implementation != "eager"
    subnet.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in subnet.model.layers} == {"eager"}
    assert "does not support setting" not in caplog.text


def test_the_file_that_travels_imports_its_host_only() -> None:
    text = Path(sys.modules[PerLayerSizes.__module__].__file__ or "").read_text()
    imported = {line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import", "from"))}
    assert imported == {"__future__", "collections", "copy", "typing", "torch", "transformers"}
