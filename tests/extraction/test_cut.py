"""A subnet is an ordinary checkpoint: elastic logits == extracted == reloaded where this package cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import attach_random_smol, logits, random_elastic, random_tokens
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError, ShapeError
from amoeba_plugin.extraction.cut import become, extract

TinyModel = Callable[..., PreTrainedModel]
FAMILY = ["llama", "mistral", "qwen2", "qwen3"]

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
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        found[directory.name] = model.eval()(tokens).logits
        cache = None
        steps = []
        for position in range(tokens.shape[1]):
            step = model(tokens[:, position:position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
        found[directory.name + ".cached"] = torch.cat(steps, 1)
save_file(found, root / "found.safetensors")
"""


@pytest.fixture
def tokens() -> Tensor:
    return random_tokens(positions=10)


def adapted(model: PreTrainedModel, bias_compensation: bool) -> ElasticModel:
    """Elastic, with a SMOL adapter whose every parameter is random, and random compensation."""
    elastic = random_elastic(model, bias_compensation=bias_compensation)
    attach_random_smol(elastic)
    return elastic


@pytest.mark.parametrize(
    ("model_type", "bias_compensation"),
    [
        ("llama", False),
        ("llama", True),
        ("mistral", False),
        ("mistral", True),
        ("qwen2", False),
        ("qwen2", True),
        ("qwen3", False),
    ],
)
def test_elastic_equals_extracted_equals_reloaded_at_every_shape(
    tiny_model: TinyModel, tokens: Tensor, tmp_path: Path, model_type: str, bias_compensation: bool
) -> None:
    # The class that can hold the biases has no sliding window.
    model = tiny_model(
        model_type, **({"sliding_window": None} if bias_compensation and model_type == "mistral" else {})
    )
    elastic = adapted(model, bias_compensation)
    expected = {}
    for shape in elastic.space:
        name = str(shape).replace("/", "_")
        with elastic.active(shape):
            expected[name] = logits(elastic.model, tokens)
        subnet = extract(elastic, shape)
        torch.testing.assert_close(logits(subnet, tokens), expected[name], atol=1e-4, rtol=0)
        check_config(subnet)
        subnet.save_pretrained(tmp_path / name)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=300)
    found = load_file(tmp_path / "found.safetensors")
    assert len(found) == 2 * len(elastic.space)
    for name, reference in expected.items():
        torch.testing.assert_close(found[name], reference, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[f"{name}.cached"], reference, atol=1e-4, rtol=0)


def check_config(subnet: PreTrainedModel) -> None:
    """Every size the configuration states is the size of a tensor: outputs alone can hide a wrong one."""
    config, layers = subnet.config, subnet.model.layers
    assert config.num_hidden_layers == len(layers)
    for position, layer in enumerate(layers):
        attention = layer.self_attn
        assert attention.layer_idx == position
        assert attention.q_proj.weight.shape == (config.num_attention_heads * config.head_dim, config.hidden_size)
        assert attention.k_proj.weight.shape == (config.num_key_value_heads * config.head_dim, config.hidden_size)
        assert attention.o_proj.weight.shape == (config.hidden_size, config.num_attention_heads * config.head_dim)
        assert layer.mlp.gate_proj.weight.shape == (config.intermediate_size, config.hidden_size)
        assert layer.mlp.down_proj.weight.shape == (config.hidden_size, config.intermediate_size)
    if getattr(config, "layer_types", None) is not None:
        assert len(config.layer_types) == len(layers)


@pytest.mark.parametrize(
    ("model_type", "shape", "compensated", "class_name"),
    [
        ("llama", "3x1", False, "LlamaForCausalLM"),
        ("llama", "3x1/2", False, "LlamaForCausalLM"),
        ("llama", "3x3/4", False, "MistralForCausalLM"),  # 6 heads do not divide hidden 64
        ("llama", "3x3/4", True, "SeedOssForCausalLM"),
        ("mistral", "3x3/4", False, "MistralForCausalLM"),
        ("qwen2", "3x1/2", True, "SeedOssForCausalLM"),
        ("qwen3", "3x3/4", False, "Qwen3ForCausalLM"),
    ],
)
def test_the_class_is_the_models_own_or_an_identical_one_that_holds_the_sizes(
    tiny_model: TinyModel, model_type: str, shape: str, compensated: bool, class_name: str
) -> None:
    assert (
        type(extract(random_elastic(tiny_model(model_type), bias_compensation=compensated), shape)).__name__
        == class_name
    )


def test_the_elastic_model_is_left_as_it_was_and_shares_no_memory(tiny_model: TinyModel, tokens: Tensor) -> None:
    elastic = adapted(tiny_model("llama"), False)
    before = logits(elastic.model, tokens)
    subnet = extract(elastic, "4x1")
    with torch.no_grad():
        for parameter in subnet.parameters():
            parameter.zero_()
    assert torch.equal(logits(elastic.model, tokens), before)
    assert elastic.shape == elastic.space.largest


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tiny_model: TinyModel, tied: bool) -> None:
    subnet = extract(random_elastic(tiny_model("llama", tie_word_embeddings=tied)), "2x1/2")
    assert (subnet.lm_head.weight is subnet.model.embed_tokens.weight) == tied


def test_become_turns_a_held_object_into_the_subnet(tiny_model: TinyModel, tokens: Tensor) -> None:
    model = tiny_model("llama")
    elastic = random_elastic(model)
    subnet = extract(elastic, "2x3/4")
    expected = logits(subnet, tokens)
    become(model, subnet)
    assert type(model).__name__ == "MistralForCausalLM"
    assert torch.equal(logits(model, tokens), expected)


def test_qwen3_cannot_store_compensation_and_says_so(tiny_model: TinyModel) -> None:
    with pytest.raises(ArchitectureError, match="set bias_compensation: false"):
        extract(random_elastic(tiny_model("qwen3"), bias_compensation=True), "4x1/2")


def test_a_sliding_window_and_compensation_have_no_class_and_say_so(tiny_model: TinyModel) -> None:
    elastic = random_elastic(tiny_model("mistral", sliding_window=8), bias_compensation=True)
    with pytest.raises(ArchitectureError, match="has no window"):
        extract(elastic, "4x1/2")


def test_a_shape_outside_the_space_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(ShapeError, match="outside the space"):
        extract(random_elastic(tiny_model("llama")), "1x1/2")
