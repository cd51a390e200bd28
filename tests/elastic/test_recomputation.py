"""Gradient checkpointing where several shapes run before one backward: each layer is recomputed at its own shape."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from support.architectures import CONFIGS
from support.models import random_elastic, random_tokens
from support.packed_linears import pack
from support.sublayers import elastic_of
from support.training import add_smol, attach_adapter, gradients_of, make_elastic

TinyModel = Callable[..., PreTrainedModel]
SHAPES = ("4x1", "2x1/2", "2x1/2")  # the last two differ in their noise alone
TOKENS = random_tokens(61)


def gradients_of_two_steps(
    elastic: ElasticModel, model: nn.Module, shapes: tuple[str, ...] = SHAPES, **checkpointing: Any
) -> list[dict[str, Tensor]]:
    """Run several shapes, then one backward; and again, for what the first backward may leave behind."""
    model.train()
    if checkpointing:
        elastic.model.gradient_checkpointing_enable(checkpointing)
    found = []
    for _ in range(2):
        losses = []
        for shape in shapes:
            elastic.set_shape(shape)
            losses.append(model(input_ids=TOKENS, labels=TOKENS).loss)
        torch.stack(losses).sum().backward()
        assert str(elastic.shape) == shapes[-1]
        found.append(gradients_of(model))
        model.zero_grad()
    return found


def require_equal(make: Callable[[], tuple[ElasticModel, nn.Module]], shapes: tuple[str, ...] = SHAPES) -> None:
    expected = gradients_of_two_steps(*make(), shapes)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected[1].values())
    for reentrant in (True, False):
        found = gradients_of_two_steps(*make(), shapes, use_reentrant=reentrant)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", ["none", "lora", "smol"])
def test_gradients_are_those_without_checkpointing(adapter: str):
    def make() -> tuple[ElasticModel, nn.Module]:
        elastic = make_elastic(attention_dropout=0.1)
        torch.manual_seed(0)
        if adapter == "none":
            return elastic, elastic.model
        model = add_smol(elastic, lora_dropout=0.1) if adapter == "smol" else attach_adapter(elastic, "lora")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return elastic, model

    require_equal(make)


@pytest.mark.parametrize("model_type", ["mixtral", "olmo2", "phi3", "packed"])
def test_all_that_follows_the_shape_is_recomputed_as_it_was_run(tiny_model: TinyModel, model_type: str):
    def make() -> tuple[ElasticModel, nn.Module]:
        model = pack(tiny_model("llama")) if model_type == "packed" else tiny_model(**CONFIGS[model_type])
        elastic = random_elastic(model)
        return elastic, add_smol(elastic)

    require_equal(make, ("2x1/2", "3x3/4"))


def test_layers_that_lack_a_part_are_recomputed_without_it(tiny_model: TinyModel):
    def make() -> tuple[ElasticModel, nn.Module]:
        elastic = elastic_of(tiny_model("llama"))
        return elastic, add_smol(elastic)

    require_equal(make, ("3x1", "3.5x1/2", "2x1/2"))


def test_copies_of_a_checkpointed_model_are_ordinary_ones():
    elastic = make_elastic()
    elastic.set_shape("3x1/2")
    expected = gradients_of_two_steps(elastic, elastic.model, ("3x1/2",), use_reentrant=True)
    elastic.model.disable_input_require_grads()  # transformers' hook cannot be pickled
    for copied in (copy.deepcopy(elastic.model), ForkingPickler.loads(ForkingPickler.dumps(elastic.model))):
        copied(input_ids=TOKENS, labels=TOKENS).loss.backward()
        elastic.set_shape("4x1")  # of the copy, nobody switches the shape
        torch.testing.assert_close(gradients_of(copied), expected[0])
        elastic.set_shape("3x1/2")


def test_an_elastic_model_given_back_holds_nothing():
    elastic = make_elastic()
    gradients_of_two_steps(elastic, elastic.model, ("3x1/2",), use_reentrant=True)
    elastic.release()
    model, gone = elastic.model, weakref.ref(elastic)
    del elastic
    gc.collect()
    assert gone() is None
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert not model.model._forward_pre_hooks
