"""One shape as an ordinary LoRA, loaded by stock PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from amoeba_plugin.errors import AdapterError, ArtifactError, ShapeError
from amoeba_plugin.smol import SmolConfig
from support.small_disk import files_in, small_disk

WITHOUT_PLUGIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
directory = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory + "/base"), directory + "/lora").eval()
torch.save(model(torch.load(directory + "/tokens.pt")).logits, directory + "/logits.pt")
assert not any(name.startswith("amoeba_plugin") for name in sys.modules)
"""


@pytest.mark.parametrize("combination", ["factors", "outputs"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 2.5, "layers.1.*v_proj": 9}}],
)
def test_lora_equals_smol_at_every_shape(
    smol_model: Callable[..., PeftModel],
    base_model: Any,
    tokens: Tensor,
    tmp_path: Path,
    combination: str,
    fields: dict[str, Any],
) -> None:
    model = smol_model(combination=combination, **fields)
    for shape in model.peft_config["default"].space:
        model.set_shape(shape)
        expected = model(tokens).logits
        model.set_shape("4x1")
        directory = tmp_path / str(shape).replace("/", "_")
        model.to_lora(directory, shape)
        assert str(model.shape) == "4x1"
        lora = PeftModel.from_pretrained(base_model(), directory).eval()
        assert type(lora.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(lora(tokens).logits, expected, rtol=0, atol=1e-5)
        config = json.loads((directory / "adapter_config.json").read_text())
        rank = 3 if combination == "factors" else 6
        assert config["r"] == rank
        assert sorted(config["target_modules"]) == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
        if not fields:
            assert config["lora_alpha"] == 5 * rank / 3


def test_stock_peft_needs_no_plugin(
    smol_model: Callable[..., PeftModel], base_model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    base_model().save_pretrained(tmp_path / "base")
    torch.save(tokens, tmp_path / "tokens.pt")
    model = smol_model()
    model.set_shape("3x1/2")
    model.to_lora(tmp_path / "lora")
    subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path)], check=True, cwd=tmp_path, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(tokens).logits, rtol=0, atol=1e-5)


def test_targets_that_need_full_names(
    smol_model: Callable[..., PeftModel], base_model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = smol_model(target_modules=r".*layers\.[02].*(q_proj|up_proj)")
    model.to_lora(tmp_path, "2x1")
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == [
        f"model.layers.{i}.{name}" for i in (0, 2) for name in ("mlp.up_proj", "self_attn.q_proj")
    ]
    model.set_shape("2x1")
    lora = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(lora(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_factors_are_those_of_the_delta(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(combination="outputs")
    model.set_shape("2x1/2")
    pairs = model.lora_factors()
    assert len(pairs) == 28
    for name, (a, b, scaling) in pairs.items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(scaling * b @ a, delta)
    with pytest.raises(ShapeError, match="5x1 is outside"):
        model.lora_factors("5x1")


def test_conv1d(tmp_path: Path) -> None:
    base = nn.Sequential(Conv1D(6, 5))
    model = get_peft_model(base, SmolConfig(r=2, target_modules=["0"], init_weights=False)).eval()
    x = torch.randn(4, 5)
    expected = model(x)
    model.to_lora(tmp_path)
    lora = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"modules_to_save": ["lm_head"]}, "whole modules"), ({"bias": "all"}, "also holds biases")],
)
def test_what_a_lora_would_lose_is_refused(
    smol_model: Callable[..., PeftModel], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        smol_model(**fields).to_lora(tmp_path)
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_the_adapter_of_before_stays(smol_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    model, disk = smol_model(), tmp_path / "disk"
    full = 0
    for size in range(4, 64, 4):
        with small_disk(disk, size):
            for shape in ("4x1", "2x1/2"):
                before = files_in(disk)
                try:
                    model.to_lora(disk / "lora", shape)
                except ArtifactError as error:
                    assert f"the disk of {disk / 'lora'} is full" in str(error)  # noqa: PT017
                    assert files_in(disk) == before
                    full += 1 + bool(before)
                else:
                    assert set(files_in(disk)) == {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    assert full > 2
