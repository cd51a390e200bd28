"""Gradients of the calibration loss against transformers' own loss and one backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.errors import ArchitectureError, DataError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.depth.layer_importance import taylor
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.width.ranking import coupled_parameters

TinyModel = Callable[..., PreTrainedModel]
Batches = Callable[..., list[dict[str, Tensor]]]


def split(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: column[row : row + 1] for name, column in batch.items()} for batch in batches for row in (0, 1)]


def test_gradients_are_those_of_one_pass_however_the_data_is_cut(
    tiny_model: TinyModel, random_batches: Batches
) -> None:
    model, batches = tiny_model("qwen2", layers=2), random_batches(2, lengths=(12, 5))
    plain = copy.deepcopy(model)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    plain(**whole, use_cache=False).loss.backward()
    wanted = coupled_parameters(plain, architecture_for("qwen2"))
    for cut in (batches, split(batches), [whole]):
        weights = coupled_parameters(model, architecture_for("qwen2"))
        found = loss_gradients(model, weights, cut, progress=False)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-4, atol=1e-7)


def test_flags_gradients_and_modes_come_back(tiny_model: TinyModel, random_batches: Batches) -> None:
    model = tiny_model("llama", layers=1).train()
    weights = coupled_parameters(model, architecture_for("llama"))
    frozen, trained = weights["0.mlp.up_proj"].requires_grad_(False), weights["0.mlp.down_proj"]
    trained.grad = torch.ones_like(trained)
    loss_gradients(model, weights, random_batches(1), progress=False)
    assert not frozen.requires_grad
    assert trained.requires_grad
    assert torch.equal(trained.grad, torch.ones_like(trained))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not trained)
    assert all(module.training for module in model.modules())
    assert not any(weight._post_accumulate_grad_hooks for weight in weights.values())


def test_a_gradient_that_is_not_finite_is_named_with_its_batch(tiny_model: TinyModel, random_batches: Batches) -> None:
    model = tiny_model("llama", layers=2)
    weights, batches = coupled_parameters(model, architecture_for("llama")), random_batches(3)
    used = set(torch.cat([batch["input_ids"].flatten() for batch in batches[:2]]).tolist())
    token = next(token for token in batches[2]["input_ids"].flatten().tolist() if token not in used)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("inf")
    with pytest.raises(DataError, match=r"gradient of \d\.\S+ is NaN or infinite on calibration batch 2"):
        loss_gradients(model, weights, batches, progress=False)
    assert all(weight.grad is None for weight in weights.values())


def test_nothing_to_predict_is_refused(tiny_model: TinyModel, random_batches: Batches) -> None:
    model = tiny_model("llama", layers=1)
    weights = coupled_parameters(model, architecture_for("llama"))
    with pytest.raises(DataError, match="no token to compute gradients on"):
        loss_gradients(model, weights, random_batches(1, positions=1), progress=False)


def test_gradients_of_offloaded_weights_are_refused_with_what_needs_none(
    tiny_model: TinyModel, random_batches: Batches
) -> None:
    model, adapter = tiny_model("llama", layers=2), architecture_for("llama")
    weights = coupled_parameters(model, adapter)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ArchitectureError, match="accelerate offloads.*flap"):
        loss_gradients(model, weights, random_batches(1), progress=False)
    with pytest.raises(ArchitectureError, match="accelerate offloads.*block_influence"):
        taylor(model, adapter, random_batches(1), progress=False)
