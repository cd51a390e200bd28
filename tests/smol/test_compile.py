"""torch.compile: the shape is in tensors, so one graph serves the whole space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.testing import CompileCounter


@pytest.mark.parametrize("combination", ["factors", "outputs"])
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_all_shapes(
    smol_model: Callable[..., PeftModel], tokens: Tensor, combination: str, training: bool
) -> None:
    torch.compiler.reset()
    model = smol_model(combination=combination).train(training)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = set()
    for shape in model.peft_config["default"].space:
        model.set_shape(shape)
        state = model.base_model.router.weights("default").state
        logits = compiled(tokens, use_cache=False).logits
        if training:
            logits.sum().backward()
            assert model.base_model.router.weights("default").state is state  # the noise is that of set_shape
        seen.add(tuple(model.routing().tolist()))
        eager = _eager_logits(model, tokens, state)
        torch.testing.assert_close(logits, eager, rtol=0, atol=1e-5)
    assert len(seen) == 9
    assert counter.frame_count == 1


def _eager_logits(model: PeftModel, tokens: Tensor, state: Any) -> Tensor:
    """The same forward uncompiled, with the same noise."""
    router = model.base_model.router
    router.detach()
    router.weights("default").state = state
    logits = model(tokens, use_cache=False).logits
    router.attach(model.base_model.model)
    return logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports torch.jit code that warns of itself
def test_inductor(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    torch.compiler.reset()
    model = smol_model()
    compiled = torch.compile(model, fullgraph=True)
    for shape in ("4x1", "3x1/2", "2x3/4"):
        model.set_shape(shape)
        torch.testing.assert_close(
            compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits, rtol=0, atol=1e-5
        )
