"""What a machine computes in by default, and checkpoints stored again in another dtype."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from amoeba_plugin.runtime.dtypes import computing_dtype, products_of, store_in, stored_dtype
from support.models import make_tiny_model


@pytest.mark.parametrize(
    ("stored", "has", "expected"),
    [
        (torch.bfloat16, "avx512_bf16", "bfloat16"),
        (torch.bfloat16, "amx_bf16", "bfloat16"),
        (torch.bfloat16, "sve_bf16", "bfloat16"),
        (torch.bfloat16, "avx512_fp16", "float32"),
        (torch.float16, "avx512_fp16", "float16"),
        (torch.float16, "avx512_bf16", "float32"),
        (torch.float32, "avx2", "float32"),
    ],
)
def test_a_cpu_computes_in_the_model_s_dtype_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, has: str, expected: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    capabilities = MappingProxyType({"avx2": True, "amx_bf16": False, has: True, "architecture": "x86_64"})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    found, told = computing_dtype(stored)
    assert found == expected
    assert told.startswith(f"computing in {expected}")
    assert ("no instructions for" in told) == (expected != str(stored).removeprefix("torch."))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert computing_dtype(stored)[0] == str(stored).removeprefix("torch.")


def test_torch_tells_a_cpu_s_instructions_by_these_names() -> None:
    """A contract with torch, whose names they are."""
    capabilities = torch.cpu.get_capabilities()
    x86 = {"avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"}
    assert x86 <= capabilities.keys() or {"bf16", "fp16_arith"} <= capabilities.keys()


def test_a_checkpoint_is_stored_again_with_what_is_packed_left_alone(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    packed = {
        "a.weight_packed": torch.arange(4, dtype=torch.int32), "a.weight_scale": torch.rand(3),
        "a.weight_global_scale": torch.rand(1), "a.fp8": torch.rand(3).to(torch.float8_e4m3fn),
    }  # fmt: skip
    before = {path: load_file(path) for path in shards}
    save_file(before[shards[0]] | packed, shards[0], {"format": "pt"})
    store_in(tmp_path, torch.bfloat16)
    found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    for name, tensor in {name: tensor for each in before.values() for name, tensor in each.items()}.items():
        assert torch.equal(found[name], tensor.bfloat16())
    for name in ("a.weight_packed", "a.weight_global_scale", "a.fp8"):
        assert found[name].dtype == packed[name].dtype
        assert torch.equal(found[name].float(), packed[name].float())
    assert found["a.weight_scale"].dtype == torch.bfloat16
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert stored_dtype(str(tmp_path)) == AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert not list(tmp_path.glob("*partial*"))


def test_products_of_narrow_numbers_lose_nothing() -> None:
    """Against fp64: as near as products in float32 are, for numbers of either dtype; and what is set comes back."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.randn(2048, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
        with pytest.raises(RuntimeError, match="stop"), products_of(dtype):
            found = rows.float().mT @ rows.float()
            raise RuntimeError("stop")
        torch.testing.assert_close(found.double(), rows.double().mT @ rows.double(), atol=2e-3, rtol=0)
        assert torch.backends.mkldnn.matmul.fp32_precision == before
