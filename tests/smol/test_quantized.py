"""SMOL on bases that a library quantized, through PEFT's own backends; compressed-tensors is in test_packed.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTQConfig, TorchAoConfig

from amoeba_plugin.errors import AdapterError
from amoeba_plugin.smol import SmolConfig, SmolLinear
from amoeba_plugin.smol import layer as layer_module
from amoeba_plugin.smol import model as model_module

FIELDS: dict[str, Any] = dict(r=4, widths=["1", "1/2"], init_weights=False)


def require_trains_at_every_shape(model: PeftModel, tokens: Tensor) -> None:
    """Shapes differ, gradients reach the factors and the router, the base is frozen."""
    logits = []
    for shape in ("4x1", "4x1/2"):
        model.set_shape(shape)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        logits.append(output.logits.detach())
    assert not torch.allclose(*logits)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("smol_" in name)
        assert "smol_" not in name or parameter.grad.abs().sum().isfinite()
    assert model.base_model.router.weights("default").up_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits: int, tokens: Tensor) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = (
        bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        if bits == 8
        else bitsandbytes.nn.Linear4bit(64, 64)
    )
    base = torch.nn.Sequential(layer).to("cpu")
    config = SmolConfig(r=4, widths=["1", "1/2"], target_modules=["0"], init_weights=False)
    model = get_peft_model(base, config).eval()
    x = torch.randn(2, 3, 64)
    outputs = {}
    for width in ("1", "1/2"):
        model.set_shape(f"1x{width}")
        outputs[width] = model(x)
        update = outputs[width] - base[0].base_layer(x)
        torch.testing.assert_close(update, x @ base[0].get_delta_weight("default").T, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(outputs["1"], outputs["1/2"])
    outputs["1"].sum().backward()
    assert base[0].smol_experts["default"].A.grad.abs().sum() > 0
    with torch.no_grad():  # after such a forward bitsandbytes has 4-bit weights in another layout
        before = model(x)
        model.merge_adapter()
        merged = model(x)
        model.unmerge_adapter()
        for result in (merged, model(x)):
            assert (result - before).norm() < {8: 0.05, 4: 0.2}[bits] * before.norm()  # the error of quantizing anew


@pytest.mark.filterwarnings("ignore")  # what the library says of itself when it is imported
def test_torchao(base_model: Callable[..., Any], tokens: Tensor, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base_model(hidden_size=32, intermediate_size=64).save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base.eval(), SmolConfig(**FIELDS, target_modules=["q_proj", "up_proj", "down_proj"]))
    layers = [module for module in model.modules() if isinstance(module, SmolLinear)]
    assert {layer.quantization_backend.backend_name for layer in layers} == {"torchao"}
    require_trains_at_every_shape(model.train(), tokens)
    model.eval()
    model.set_shape("4x1/2")
    expected = model(tokens).logits
    with model.disable_adapter():
        plain = model(tokens).logits
    model.merge_adapter()
    merged = model(tokens).logits  # merged into int8: right but for the rounding
    assert (merged - expected).norm() < 0.1 * (plain - expected).norm()
    model.unmerge_adapter()
    assert (model(tokens).logits - expected).norm() < 0.1 * (plain - expected).norm()


@pytest.mark.gpu
@pytest.mark.hub
def test_gptq(tokens: Tensor) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    base = AutoModelForCausalLM.from_pretrained(
        "marcsun13/opt-350m-gptq-4bit", device_map="auto", quantization_config=GPTQConfig(bits=4)
    )
    model = get_peft_model(base, SmolConfig(**FIELDS, target_modules=["q_proj", "v_proj"]))
    model.set_shape(f"{base.config.num_hidden_layers}x1/2")
    model(tokens.to(base.device), labels=tokens.to(base.device)).loss.backward()
    assert model.base_model.router.weights("default").up_weight.grad.abs().sum() > 0
    with pytest.raises(AdapterError, match="is quantized by gptq"):
        model.merge_adapter()


class IntegerLinear(nn.Module):
    """Holds integers and no weight, as GPTQ's layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale, self.bias)


def test_a_backend_that_cannot_merge_says_so_before_anything_is_merged(
    base_model: Callable[..., Any], tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = layer_module.resolve_quantization_backend

    def resolve_stub(layer: nn.Module, **kwargs: Any) -> Any:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, IntegerLinear) else resolve(layer, **kwargs)

    for module in (layer_module, model_module):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve_stub)
    base = base_model()
    for decoder in base.model.layers:
        decoder.mlp.up_proj = IntegerLinear(decoder.mlp.up_proj)
    torch.manual_seed(0)
    model = get_peft_model(base, SmolConfig(**FIELDS, target_modules=["q_proj", "up_proj"])).eval()
    require_trains_at_every_shape(model, tokens)
    expected = model(tokens).logits
    with pytest.raises(AdapterError, match=r"'model.layers.0.mlp.up_proj' is quantized by gptq.*to_lora"):
        model.merge_adapter()
    assert not model.get_model_status().merged_adapters
    assert torch.equal(model(tokens).logits, expected)
