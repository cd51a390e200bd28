"""A few tokens in evaluation: experts are mixed by what they make of the tokens, and routed once in a forward."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.smol.layer import FEW


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


def adapted(combination: str, adapt_largest: bool = True) -> PeftModel:
    torch.manual_seed(0)
    config = SmolConfig(
        r=3, num_experts=4, top_k=2, combination=combination, target_modules=["up", "down"], depths=[2, 1],
        widths=["1"], num_layers=2, adapt_largest=adapt_largest, lora_alpha=5, rank_pattern={"down": 2},
    )  # fmt: skip
    model = get_peft_model(Mlp(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def by_hand(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
    """Return the output by the whole update of every weight, added to it."""
    found = []
    for linear in (model.base_model.model.up, model.base_model.model.down):
        weight = linear.base_layer.weight + linear.get_delta_weight("default")
        found.append((weight, linear.base_layer.bias))
    return nn.functional.linear(nn.functional.linear(x, *found[0]).tanh(), *found[1])


@pytest.mark.parametrize("combination", ["outputs", "factors"])
@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1])
def test_few_tokens_and_many_get_the_update_of_their_shape(combination: str, tokens: int):
    model = adapted(combination)
    x = torch.randn(1, tokens, 6)
    with torch.no_grad():
        found = []
        for shape in ("2x1", "1x1", "2x1"):
            model.set_shape(shape)
            found.append(model(x))
            torch.testing.assert_close(found[-1], by_hand(model, x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_the_whole_model_stays_what_it_was_where_it_is_not_adapted(tokens: int):
    model, x = adapted("outputs", adapt_largest=False), torch.randn(1, tokens, 6)
    with torch.no_grad(), model.disable_adapter():
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_the_router_is_asked_once_in_a_forward_without_gradients_and_anew_in_the_next():
    model, x = adapted("outputs"), torch.randn(1, 2, 6)
    asked = []
    weights = model.base_model.router.weights("default")
    weights.register_forward_hook(lambda *_: asked.append(1))
    with torch.no_grad():
        model(x)
        assert len(asked) == 1
        weights.up_weight.neg_()
        torch.testing.assert_close(model(x), by_hand(model, x), atol=1e-5, rtol=1e-5)
        weights.up_weight.neg_()
        single = model.base_model.model.up  # with no forward of the model around it
        delta = single.get_delta_weight("default")
        torch.testing.assert_close(single(x), single.base_layer(x) + x @ delta.T, atol=1e-5, rtol=1e-5)
    asked.clear()
    model(x)
    assert len(asked) == 2  # every layer has a graph of its own


@pytest.mark.parametrize("combination", ["outputs", "factors"])
def test_gradients_of_few_tokens_in_evaluation_are_those_of_many(combination: str):
    model, x = adapted(combination), torch.randn(1, FEW, 6)
    model.base_model.model.up.requires_grad_(True)
    gradients = []
    for tokens in (x, torch.cat([x, x], dim=1)):
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([each.grad for name, each in model.named_parameters() if "smol_experts" in name])
    for few, many in zip(*gradients, strict=True):
        torch.testing.assert_close(2 * few, many, atol=1e-4, rtol=1e-4)
