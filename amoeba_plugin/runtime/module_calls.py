"""How hosts run a module: its mode and its answer for a while, where inputs go, offloaded weights held meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn


@contextmanager
def answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Let a function answer in a module's place: its hooks, attributes and class stay, its own forward does not run.

    >>> linear = nn.Linear(2, 3)
    >>> with answering(linear, lambda states: states + 1):
    ...     linear(torch.zeros(1)).item()
    1.0
    >>> linear(torch.zeros(2)).shape
    torch.Size([3])
    """
    before = vars(module).get("forward")  # accelerate replaces the method by an attribute too
    vars(module)["forward"] = answer
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in evaluation mode; every module gets its own mode back in the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def input_device(model: Any) -> torch.device:
    """Return the device that token ids are moved to; accelerate leaves weights that it offloads on "meta"."""
    embeddings = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(device) if device is not None else embeddings.weight.device


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether accelerate fetches some weights of a module, or of a part of it, at every call."""
    return any(has_offloaded_params(part) for part in module.modules())


@contextmanager
def onloaded(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Fetch the weights that modules hold themselves once for a whole block; accelerate would at every call.

    Args:
        parts: Such as ``layer.modules()``.
    """
    with ExitStack() as stack:
        for part in parts:
            if has_offloaded_params(part):
                stack.enter_context(align_module_device(part))
                stack.enter_context(_kept(part._hf_hook))
        yield


@contextmanager
def _kept(hook: Any) -> Iterator[None]:
    hook.offload = False
    try:
        yield
    finally:
        hook.offload = True
