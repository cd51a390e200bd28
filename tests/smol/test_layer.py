"""The arithmetic of one layer, against loops written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from amoeba_plugin.smol import SmolConfig, SmolLinear


class PrefixLinear(nn.Linear):
    """Computes with the first channels of either side, as an elastic layer does."""

    active_in = active_out = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[: self.active_out, : self.active_in], self.bias[: self.active_out])


def by_hand(layer: SmolLinear, x: Tensor, out_features: int, adapter: str = "default") -> Tensor:
    """The update, expert by expert."""
    weights = layer.router.smol_router[adapter]
    config, bank = weights.config, layer.smol_experts[adapter]
    f = torch.zeros(config.num_layers + len(config.widths), dtype=torch.float64)
    f[list(weights.state.kept_layers)] = 1
    f[config.num_layers + config.widths.index(str(weights.state.shape.width))] = 1
    double = {name: p.detach().double() for name, p in weights.named_parameters()}
    hidden = double["down_weight"] @ f + double["down_bias"]
    logits = double["up_weight"] @ hidden + double["up_bias"]
    chosen = sorted(range(config.num_experts), key=lambda e: -logits[e])[: config.top_k]
    gates = [torch.exp(logits[e]) / sum(torch.exp(logits[other]) for other in chosen) for e in chosen]
    rank = bank.A.shape[0] // config.num_experts
    a = [bank.A.detach().double()[e * rank : (e + 1) * rank, : x.shape[-1]] for e in chosen]
    b = [bank.B.detach().double()[:out_features, e * rank : (e + 1) * rank] for e in chosen]
    if config.combination == "factors":
        delta = sum(g * m for g, m in zip(gates, b, strict=True)) @ sum(g * m for g, m in zip(gates, a, strict=True))
    else:
        delta = sum(g * (m @ n) for g, m, n in zip(gates, b, a, strict=True))
    return x.double() @ delta.T * config.lora_alpha / rank


@pytest.mark.parametrize("combination", ["factors", "outputs"])
def test_forward_and_delta_equal_the_loop_at_every_shape(
    smol_model: Callable[..., PeftModel], combination: str
) -> None:
    model = smol_model(combination=combination)
    layers = [module for module in model.modules() if isinstance(module, SmolLinear)]
    assert len(layers) == 4 * 7
    seen = set()
    for shape in model.peft_config["default"].space:
        model.set_shape(shape)
        seen.add(tuple(model.routing().tolist()))
        for layer in layers:
            x = torch.randn(5, layer.in_features)
            expected = by_hand(layer, x, layer.out_features)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close((layer(x) - layer.base_layer(x)).double(), expected, rtol=1e-4, atol=1e-5)
            delta = layer.get_delta_weight("default")
            assert (delta.shape, delta.dtype) == ((layer.out_features, layer.in_features), torch.float32)
            torch.testing.assert_close(x.double() @ delta.double().T, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 9  # every shape has its own mixture


@pytest.mark.parametrize("combination", ["factors", "outputs"])
def test_a_base_that_uses_a_prefix_of_its_channels(combination: str, randomize: Callable[..., None]) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": PrefixLinear(11, 13)})
    config = SmolConfig(r=3, widths=["1", "1/2"], combination=combination, target_modules=["layer"], init_weights=False)
    model = get_peft_model(base, config).eval()
    randomize(model)
    layer = model.base_model.model["layer"]
    for active_in, active_out, width in [(11, 13, "1"), (7, 13, "1/2"), (11, 5, "1/2"), (4, 9, "1"), (1, 1, "1/2")]:
        model.set_shape(f"1x{width}")
        layer.base_layer.active_in, layer.base_layer.active_out = active_in, active_out
        x = torch.randn(2, 6, active_in)
        update = layer(x) - layer.base_layer(x)
        assert update.shape == (2, 6, active_out)
        torch.testing.assert_close(update.double(), by_hand(layer, x, active_out), rtol=1e-4, atol=1e-5)
        delta = layer.get_delta_weight("default")[:active_out, :active_in]
        torch.testing.assert_close(x @ delta.T, update, rtol=1e-4, atol=1e-5)
        layer(x).sum().backward()
        unused = layer.smol_experts["default"].A.grad[:, active_in:]
        assert unused.numel() == 0 or unused.abs().max() == 0
        layer.smol_experts["default"].A.grad = None
        model.merge_adapter()
        merged = layer(x)
        model.unmerge_adapter()
        torch.testing.assert_close(merged, layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("init_weights", "std"), [(True, None), ("gaussian", 0.25)])
def test_a_fresh_adapter_changes_nothing(init_weights: bool | str, std: float | None) -> None:
    config = SmolConfig(r=4, init_weights=init_weights, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(500, 6)), config).eval()
    x = torch.randn(3, 500)
    layer = model.base_model.model[0]
    assert torch.equal(model(x), layer.base_layer(x))
    if std is not None:
        assert layer.smol_experts["default"].A.std().item() == pytest.approx(std, rel=0.05)


def test_rslora_patterns_and_scale(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 7.0}, lora_alpha=6)
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.smol_experts["default"].A.shape == (4 * 4, 16)
    scales = [m.smol_scaling["default"] for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert scales == pytest.approx([6 / 4**0.5, 6 / 3**0.5, 7 / 3**0.5])
    before = attention.q_proj.get_delta_weight("default")
    attention.q_proj.scale_layer(3)
    torch.testing.assert_close(attention.q_proj.get_delta_weight("default"), 3 * before)
    attention.q_proj.unscale_layer(3)
    torch.testing.assert_close(attention.q_proj.get_delta_weight("default"), before)
    attention.q_proj.scale_layer(2)
    attention.q_proj.unscale_layer()
    assert torch.equal(attention.q_proj.get_delta_weight("default"), before)


def test_dropout_acts_in_training_only(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model(lora_dropout=0.5, router_noise=False)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_repr_names_the_method(smol_model: Callable[..., PeftModel]) -> None:
    assert "smol.SmolLinear(" in repr(smol_model())
