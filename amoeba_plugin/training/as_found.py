"""What a training sets on a model, and nobody wants to find there afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

FORWARD_NAMES = ("forward", "_original_forward")  # what accelerate hangs on a model for autocast, and leaves there


@contextmanager
def as_found(inner: PreTrainedModel, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give back, after a block of code, what training sets on a model; clear its gradients.

    Args:
        inner: The transformers model.
        modules: All that training may touch, that around the model first.
    """
    modules = list(modules)
    outer = modules[0]
    modes = [(module, module.training) for module in modules]
    trainable = [(value, value.requires_grad) for module in modules for value in module.parameters(recurse=False)]
    use_cache = inner.config.use_cache
    checkpointing = inner.is_gradient_checkpointing
    inputs_learn = hasattr(inner, "_require_grads_hook")
    wrapped = {name: vars(outer)[name] for name in FORWARD_NAMES if name in vars(outer)}
    try:
        yield
    finally:
        outer.train(modes[0][1])  # the layer list may be a new module by now
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        inner.config.use_cache = use_cache
        if inner.is_gradient_checkpointing and not checkpointing:
            inner.gradient_checkpointing_disable()
        if not inputs_learn:  # checkpointing has the embeddings' output require a gradient, and leaves it so
            inner.disable_input_require_grads()
        for name in FORWARD_NAMES:
            vars(outer).pop(name, None)
        vars(outer).update(wrapped)
