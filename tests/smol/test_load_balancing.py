"""The optional term that makes the shapes use all experts: its value, its gradient, its way into training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import TrainingArguments

from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.smol.router_weights import importance_loss
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.models import random_elastic


@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.floats(0.01, 1), min_size=n, max_size=n), min_size=1)))
def test_importance_loss_is_the_squared_coefficient_of_variation(mixtures: list[list[float]]) -> None:
    importance = [fmean(column) for column in zip(*mixtures, strict=True)]
    expected = (pstdev(importance) / fmean(importance)) ** 2
    assert importance_loss(torch.tensor(mixtures)).item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_off_by_default(smol_model: Callable[..., PeftModel]) -> None:
    loss = smol_model().train().load_balancing_loss()
    assert (loss.item(), loss.shape, loss.requires_grad) == (0.0, (), False)


def test_value_is_over_all_shapes_and_leaves_the_active_one(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(router_load_balancing=0.5)
    mixtures = []
    for shape in model.peft_config["default"].space:
        model.set_shape(shape)
        mixtures.append(model.routing())
    state = model.base_model.router.weights("default").state
    loss = model.load_balancing_loss()
    assert model.base_model.router.weights("default").state is state
    torch.testing.assert_close(loss, 0.5 * importance_loss(torch.stack(mixtures)))
    loss.backward()
    weights = model.base_model.router.weights("default")
    assert weights.up_weight.grad.abs().sum() > 0
    assert weights.down_weight.grad.abs().sum() > 0


def test_noise_in_training_from_the_routers_own_generator(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(router_load_balancing=1.0).train()
    weights = model.base_model.router.weights("default")
    weights.seed_noise(7)
    first, second = model.load_balancing_loss(), model.load_balancing_loss()
    assert first != second
    weights.seed_noise(7)
    assert model.load_balancing_loss() == first
    model.eval()
    assert model.load_balancing_loss() == model.load_balancing_loss()


@pytest.mark.parametrize("adapt_largest", [True, False])
def test_descending_it_brings_experts_back(smol_model: Callable[..., PeftModel], adapt_largest: bool) -> None:
    model = smol_model(router_load_balancing=1.0, adapt_largest=adapt_largest).train()
    weights = model.base_model.router.weights("default")
    weights.seed_noise(0)
    with torch.no_grad():  # all shapes choose experts 0 and 1
        weights.up_weight.zero_()
        weights.up_bias.copy_(torch.tensor([2.0, 2.0, 0.0, 0.0]))

    def used() -> int:
        chosen = set()
        for shape in model.peft_config["default"].space:
            model.set_shape(shape)
            chosen |= set(model.routing().nonzero().flatten().tolist())
        return len(chosen)

    model.eval()
    assert used() == 2
    before = model.load_balancing_loss().item()
    model.train()
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model.load_balancing_loss().backward()
        optimizer.step()
    model.eval()
    assert used() == 4
    assert model.load_balancing_loss().item() < 0.5 * before


def test_training_adds_it_once_per_step(tiny_model: Callable[..., Any], tmp_path: Path, randomize: Any) -> None:
    def run(weight: float) -> tuple[dict[str, Tensor], PeftModel]:
        torch.manual_seed(0)
        elastic = random_elastic(tiny_model("llama"))
        fields: dict[str, Any] = dict(r=2, num_experts=3, router_noise=False, router_load_balancing=weight)
        peft_model = attach_smol(elastic, SmolConfig(target_modules=["q_proj", "up_proj"], **fields))
        randomize(peft_model, only="smol_")
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", gradient_accumulation_steps=2)
        trainer = OneForAllTrainer(peft_model, elastic, OneForAllOptions(), args=arguments)
        for rows in torch.arange(16).view(2, 1, 8):
            trainer.training_step(peft_model, {"input_ids": rows, "labels": rows.clone()}, num_items_in_batch=14)
        gradients = {name: p.grad for name, p in peft_model.named_parameters() if p.grad is not None}
        assert ("load_balancing" in trainer.subnets.means.flush()[1]) is bool(weight)
        return gradients, peft_model

    (without, _), (with_term, peft_model) = run(0.0), run(0.7)
    peft_model.zero_grad()
    peft_model.load_balancing_loss().backward()
    for name, gradient in with_term.items():
        term = peft_model.get_parameter(name).grad
        expected = without[name] if term is None else without[name] + term
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert peft_model.base_model.router.weights("default").up_weight.grad.abs().max() > 1e-3
