"""Linears whose weight a host (bitsandbytes, torchao, GPTQ, ...) keeps in a form of its own: sizes and dense weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

UNITS_AT_ONCE = 1024
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_packed(module: nn.Module) -> bool:
    """Tell whether a module is a linear that has no dense weight; an adapter around one is not."""
    if getattr(module, "keeps_packed", False):
        return True
    if hasattr(module, "base_layer") or not any(hasattr(module, name) for name in ("in_features", "infeatures")):
        return False
    weight = module._parameters.get("weight")
    plain = type(weight) is nn.Parameter or isinstance(weight, DTensor)
    return not (isinstance(module, nn.Linear) and plain and weight.dtype in DENSE)  # type: ignore[union-attr]


def linear_sizes(linear: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear, dense or packed."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    return linear.infeatures, linear.outfeatures  # GPTQ's


def linear_device(linear: nn.Module) -> torch.device:
    """Return where a linear is, though it may have no parameter."""
    return next(each.device for each in (*linear._parameters.values(), *linear._buffers.values()) if each is not None)


def dense_weight(linear: Any) -> Tensor:
    """Return a linear's weight, (out_features, in_features), detached, in the host's order of channels.

    A packed one is unpacked by what every host has, its forward: unit vectors give the weight's columns. Where it
    quantizes its inputs too, the columns are as exact as those.
    """
    if not is_packed(linear):
        weight: Tensor = linear.weight.detach()
        return weight
    into, device, dtype = linear_sizes(linear)[0], linear_device(linear), _compute_dtype(linear)
    forward = getattr(linear, "host_forward", linear.forward)  # an elastic one's own sees a part of the channels
    columns = []
    # With a gradient, because without one bitsandbytes repacks for a CPU kernel that rounds to bf16.
    with _without_bias(linear), torch.enable_grad():
        for some in torch.arange(into, device=device).split(UNITS_AT_ONCE):
            units = functional.one_hot(some, into).to(dtype).requires_grad_()
            columns.append(forward(units).detach())
    return torch.cat(columns).T.contiguous()


@contextmanager
def _without_bias(linear: Any) -> Iterator[None]:
    bias = getattr(linear, "bias", None)
    if bias is None:
        yield
        return
    linear.bias = None
    try:
        yield
    finally:
        linear.bias = bias


def _compute_dtype(linear: nn.Module) -> torch.dtype:
    stored = getattr(linear, "weight", None)
    return stored.dtype if isinstance(stored, Tensor) and stored.dtype in DENSE else torch.float32
