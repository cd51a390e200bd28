"""SMOL on a base that compressed-tensors keeps packed; also the contract test of what compressed_linear takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.quant_args import QuantizationArgs
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM

from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import AdapterError
from amoeba_plugin.models.compressed_linear import CompressedLinear, is_compressed
from amoeba_plugin.smol import SmolConfig, SmolLinear
from amoeba_plugin.testing.random_models import random_strategy

CONFIG = dict(r=3, depths=[2, 4], widths=["1", "1/2"], target_modules=["q_proj", "up_proj"], init_weights=False)


@pytest.fixture
def packed_directory(base_model: Any, tmp_path: Path) -> Path:
    """A 4-bit checkpoint, as llm-compressor writes it."""
    model = base_model(hidden_size=32, intermediate_size=64, num_attention_heads=4)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=16)
    config = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            groups = module.weight.data.unflatten(1, (-1, 16))
            module.weight_scale.data.copy_(groups.abs().amax(dim=-1) / 7.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    compressor.update_config(tmp_path)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    compressor.update_config(tmp_path)
    return tmp_path


def load(directory: Path, dequantize: bool) -> LlamaForCausalLM:
    config = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return AutoModelForCausalLM.from_pretrained(directory, **config).eval()


def with_smol(model: LlamaForCausalLM) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, SmolConfig(**CONFIG))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # how transformers takes dequantize
def test_packed_weights_stay_packed_and_count_the_same(packed_directory: Path, tokens: Tensor) -> None:
    dense, packed = (with_smol(load(packed_directory, dequantize)) for dequantize in (True, False))
    assert len([m for m in packed.modules() if isinstance(m, CompressedLinear)]) == 28
    for shape in ("4x1", "2x1/2"):
        grads = []
        for model in (dense, packed):
            model.set_shape(shape)
            model.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert torch.equal(packed(tokens).logits, dense(tokens).logits)
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.allclose(grads[1][name], grad, rtol=1e-5, atol=1e-7) for name, grad in grads[0].items())
    assert len([m for m in packed.modules() if is_compressed(m)]) == 28
    assert torch.equal(copy.deepcopy(packed)(tokens).logits, packed(tokens).logits)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_an_elastic_model_of_them_computes_what_one_of_the_dense_weights_does(
    packed_directory: Path, base_model: Any, tokens: Tensor
) -> None:
    dense = base_model(hidden_size=32, intermediate_size=64, num_attention_heads=4)
    missing = dense.load_state_dict(load(packed_directory, dequantize=True).state_dict(), strict=False).missing_keys
    assert not missing
    strategy = random_strategy(dense)
    expected, found = ElasticModel(dense, strategy), ElasticModel(load(packed_directory, dequantize=False), strategy)
    for shape in expected.space:
        with expected.active(shape) as one, found.active(shape) as other:
            torch.testing.assert_close(other(tokens).logits, one(tokens).logits, atol=1e-5, rtol=1e-5)
    assert len([m for m in found.model.modules() if is_compressed(m)]) == 28


def test_a_lora_beside_packed_weights_is_refused(packed_directory: Path) -> None:
    """PEFT looks for a dense weight that is not there."""
    model = load(packed_directory, dequantize=False)
    elastic = ElasticModel(model, random_strategy(model))
    with pytest.raises(AdapterError, match="PEFT has no LoRA beside weights that compressed-tensors keeps packed"):
        attach_lora(elastic, LoraConfig(target_modules=["q_proj"]))


def test_merging_makes_the_merged_layers_dense(packed_directory: Path, tokens: Tensor) -> None:
    model = with_smol(load(packed_directory, dequantize=False))
    model.set_shape("2x1/2")
    expected = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert len([m for m in model.modules() if is_compressed(m)]) == 28 - len(
        [m for m in model.modules() if isinstance(m, SmolLinear)]
    )
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(unloaded(tokens).logits, expected, rtol=0, atol=1e-5)


def test_quantized_activations_are_left_to_the_host(packed_directory: Path, tokens: Tensor) -> None:
    base = load(packed_directory, dequantize=False)
    layer = base.model.layers[0].mlp.down_proj
    layer.quantization_scheme.input_activations = QuantizationArgs(num_bits=8)
    model = with_smol(base)
    assert hasattr(base, "ct_decompress_hook")
    assert not [m for m in model.modules() if isinstance(m, CompressedLinear)]
