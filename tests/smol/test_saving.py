"""Saved adapters: every door that PEFT and transformers have, bit for bit, the router included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from amoeba_plugin.errors import AdapterError, ShapeError
from amoeba_plugin.smol import SmolConfig, host

SHAPES = ["4x1", "3x1/2", "2x3/4"]


def logits_at(model: PeftModel, tokens: Tensor) -> list[Tensor]:
    result = []
    for shape in SHAPES:
        model.set_shape(shape)
        result.append(model(tokens).logits.detach())
    return result


@pytest.fixture
def saved(smol_model: Callable[..., PeftModel], base_model: Any, tokens: Tensor, tmp_path: Path) -> dict[str, Any]:
    base_model().save_pretrained(tmp_path / "base")
    model = smol_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return {
        "base": tmp_path / "base",
        "adapter": tmp_path / "adapter",
        "tensors": get_peft_model_state_dict(model),
        "logits": logits_at(model, tokens),
    }


def test_files_and_keys(saved: dict[str, Any]) -> None:
    tensors = load_file(saved["adapter"] / "adapter_model.safetensors")
    assert len(tensors) == 28 * 2 + 7
    assert "base_model.model.model.layers.0.self_attn.q_proj.smol_experts.A" in tensors
    routers = {
        key.rpartition(".")[2] for key in tensors if key.startswith("base_model.model.shape_router.smol_router.")
    }
    assert routers == {"down_weight", "down_bias", "up_weight", "up_bias", "noise_weight", "noise_bias", "draws"}
    config = json.loads((saved["adapter"] / "adapter_config.json").read_text())
    assert config["peft_type"] == "SMOL"
    assert config["format_version"] == 1
    assert config["num_layers"] == 4
    assert config["widths"] == ["1", "3/4", "1/2"]
    assert config["kept_layers"] == {"3": [0, 1, 3], "2": [1, 2]}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_peft_model(
    saved: dict[str, Any], base_model: Any, tokens: Tensor, adapter_name: str, low_cpu_mem_usage: bool
) -> None:
    model = PeftModel.from_pretrained(
        base_model(), saved["adapter"], adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    assert tensors.keys() == saved["tensors"].keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in saved["tensors"].items())
    for logits, expected in zip(logits_at(model, tokens), saved["logits"], strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)  # a mapped file may take another matmul kernel


def test_auto_peft_model(saved: dict[str, Any], tokens: Tensor) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(saved["adapter"]).eval()
    for logits, expected in zip(logits_at(model, tokens), saved["logits"], strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_peft_config(saved: dict[str, Any]) -> None:
    config = PeftConfig.from_pretrained(saved["adapter"])
    assert type(config) is SmolConfig
    assert config.space.largest.depth == 4


def test_transformers_loads_and_saves(saved: dict[str, Any], base_model: Any, tokens: Tensor, tmp_path: Path) -> None:
    loaded = base_model()
    loaded.load_adapter(saved["adapter"], adapter_name="mine")
    auto = AutoModelForCausalLM.from_pretrained(saved["adapter"]).eval()
    for model in (loaded, auto):
        for shape, expected in zip(SHAPES, saved["logits"], strict=True):
            model.shape_router.set_shape(shape)
            torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == saved["tensors"].keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in saved["tensors"].items())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT says so for a second adapter of any kind
def test_transformers_adapters(base_model: Any, smol_config: Any, tokens: Tensor, randomize: Any) -> None:
    model = base_model()
    plain = model(tokens).logits
    model.add_adapter(smol_config(), adapter_name="a")
    model.add_adapter(smol_config(depths=[4], widths=["1"], kept_layers=None), adapter_name="b")
    assert len([name for name in model._modules if name == "shape_router"]) == 1
    randomize(model, only="smol_")
    model.set_adapter("a")
    model.shape_router.set_shape("2x1/2")
    first = model(tokens).logits
    model.set_adapter("b")
    with pytest.raises(ShapeError, match="active shape is 2x1/2"):
        model(tokens)
    model.shape_router.set_shape("4x1")
    second = model(tokens).logits
    assert not torch.allclose(first, second)
    model.disable_adapters()
    assert torch.equal(model(tokens).logits, plain)
    model.enable_adapters()
    assert torch.equal(model(tokens).logits, second)
    model.set_adapter("a")
    model.shape_router.set_shape("2x1/2")
    assert torch.equal(model(tokens).logits, first)
    model.delete_adapter("b")
    assert list(model.shape_router.smol_router) == ["a"]
    assert torch.equal(model(tokens).logits, first)


def test_an_adapter_for_another_number_of_layers(saved: dict[str, Any], base_model: Any) -> None:
    with pytest.raises(AdapterError, match="for a model with 4 layers, but the model has 6"):
        PeftModel.from_pretrained(base_model(num_hidden_layers=6), saved["adapter"])


def test_an_adapter_of_a_newer_format(saved: dict[str, Any], base_model: Any) -> None:
    path = saved["adapter"] / "adapter_config.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(AdapterError, match="format version 2, but this package reads up to 1; upgrade"):
        PeftModel.from_pretrained(base_model(), saved["adapter"])


def test_tensors_of_another_space(saved: dict[str, Any], base_model: Any) -> None:
    path = saved["adapter"] / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"widths": ["1", "1/2"]}))
    with pytest.raises(AdapterError, match=r"down_weight is \(16, 7\).* widths 1, 1/2, .* wants \(16, 6\)"):
        PeftModel.from_pretrained(base_model(), saved["adapter"])


def test_the_model_card_names_base_and_library(saved: dict[str, Any]) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(saved["adapter"])
    model.create_or_update_model_card(str(saved["adapter"]))
    tags = ModelCard.load(saved["adapter"] / "README.md").data.tags
    assert {"transformers", f"base_model:adapter:{saved['base']}"} <= set(tags)


@pytest.mark.skipif(not host.SAVES_BIASES, reason="PEFT 0.20 does not save the biases of a method")
@pytest.mark.parametrize("bias", ["all", "smol_only", "lora_only"])
def test_trained_biases_are_saved_and_loaded(
    smol_model: Callable[..., PeftModel], base_model: Any, randomize: Any, tokens: Tensor, tmp_path: Path, bias: str
) -> None:
    model = smol_model(bias=bias, target_modules=["q_proj", "up_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    layers = range(4)
    names = ["q_proj"] if bias != "all" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert len([name for name in trained if "layers" in name]) == len(layers) * len(names)
    assert all(any(part in name for part in names) for name in trained if "layers" in name)
    for name in trained:
        randomize(model, only=name)
    model.set_shape("2x1/2")
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    loaded.set_shape("2x1/2")
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=1e-6)
