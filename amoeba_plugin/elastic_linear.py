"""Linears that compute with a part of their channels: of dense weights a slice, of packed ones the whole product.

A linear is *packed* where a host (bitsandbytes, torchao, GPTQ, ...) keeps its weight in a form of its own, which can be
neither sliced nor reordered. It then computes all of its product, as the host does; what is active is picked from the
output and put in its place in the input. That saves neither time nor memory, but everything around it sees the sizes
and the order of channels that it would see of a dense linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from amoeba_plugin.errors import AdapterError
from amoeba_plugin.slicing import Rows, count, take

UNITS_AT_ONCE = 1024
NOT_MERGED = (
    "so that no adapter of an elastic model can be merged into it; take extract(elastic, shape), or save_elastic and "
    "`amoeba extract`"
)
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class PartialLinear(nn.Module):
    """A linear of which some rows and the first columns are active; mixed into its class.

    Attributes:
        active_rows: Blocks of rows; one for an ordinary linear, several for a fused one.
        active_in: Columns.
        compensation: (widths, out_features) or ``None``; the row ``compensation_row`` is added to the output: what the
            missing input channels contributed on average.
    """

    in_features: int
    out_features: int
    active_rows: Rows
    active_in: int
    compensation: Tensor | None
    compensation_row: int | None

    @property
    def active_out(self) -> int:
        """Active rows."""
        return count(self.active_rows)

    def extra_repr(self) -> str:
        """Show the active size beside the whole one."""
        return f"{super().extra_repr()}, active={self.active_out}x{self.active_in}"

    def restore(self) -> None:
        """Turn it into the linear it was made from, of its whole size, in place."""
        raise NotImplementedError

    def _activate_all(self) -> None:
        self.active_rows, self.active_in = (slice(0, self.out_features),), self.in_features
        self.register_buffer("compensation", None, persistent=False)
        self.compensation_row = None

    def _compensated(self, output: Tensor) -> Tensor:
        if self.compensation is None or self.compensation_row is None:
            return output
        return output + take(self.compensation[self.compensation_row], self.active_rows).to(output.dtype)

    def _forget(self, *buffers: str) -> None:
        for name in ("compensation", *buffers):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        del self.active_rows, self.active_in, self.compensation_row


class ElasticLinear(PartialLinear, nn.Linear):
    """An ``nn.Linear`` that computes with some rows and the first ``active_in`` columns of its weight.

    Made from an existing linear in place (:meth:`convert`), whose parameters stay the same objects. All it computes
    with are views: a fused linear, of which every part keeps a prefix, multiplies block by block and joins the outputs.
    """

    @classmethod
    def convert(cls, linear: nn.Linear) -> ElasticLinear:
        """Turn a linear into an elastic one at full size, in place."""
        _become(linear, cls)
        assert isinstance(linear, cls)
        linear._activate_all()
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., active_in) to (..., active_out)."""
        outputs = [
            functional.linear(
                input, self.weight[rows, : self.active_in], None if self.bias is None else self.bias[rows]
            )
            for rows in self.active_rows
        ]
        return self._compensated(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1))

    def restore(self) -> None:
        """Turn it into an ordinary linear of its whole size again, in place; its channels stay as they are."""
        self._forget()
        _become(self, nn.Linear)


class PackedElasticLinear(PartialLinear):
    """Mixed into a host's class by :func:`convert_packed`: the host computes the whole product.

    ``y = host(x')[order]`` with x' zero but for the active inputs, each at the channel that it belongs to.

    Attributes:
        row_order: (out_features,) int64, for every row that others see the host's.
        column_order: (in_features,) int64, the same of the columns.
    """

    row_order: Tensor
    column_order: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # a host merging an adapter, whose channels are in another order than the weight's
            raise AdapterError(f"a {type(self).__name__} keeps its weight packed, {NOT_MERGED}")
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., active_in) to (..., active_out)."""
        # gather and scatter, because index_select and index_copy take several times as long on a CPU
        columns = self.column_order[: self.active_in].expand(input.shape)
        whole = input.new_zeros(*input.shape[:-1], linear_sizes(self)[0]).scatter(-1, columns, input)
        output: Tensor = super().forward(whole)  # the host's
        rows = take(self.row_order, self.active_rows)
        return self._compensated(output.gather(-1, rows.expand(*output.shape[:-1], -1)))

    def restore(self) -> None:
        """Turn it into the host's linear again, in place; its channels are where they always were."""
        self._forget("row_order", "column_order")
        _become(self, type(self).__bases__[1])


def convert_packed(linear: nn.Module) -> PackedElasticLinear:
    """Turn a packed linear into an elastic one at full size, in place; it stays an instance of its host's class."""
    into, out = linear_sizes(linear)
    _become(linear, _packed_class(type(linear)))  # type: ignore[arg-type]  # its metaclass is hashable
    assert isinstance(linear, PackedElasticLinear)
    if not hasattr(linear, "in_features"):
        linear.in_features, linear.out_features = into, out
    linear._activate_all()
    device = _device(linear)
    linear.register_buffer("row_order", torch.arange(out, device=device), persistent=False)
    linear.register_buffer("column_order", torch.arange(into, device=device), persistent=False)
    return linear


def is_packed(module: nn.Module) -> bool:
    """Tell whether a module is a linear that has no dense weight; an adapter around one is not."""
    if isinstance(module, PackedElasticLinear):
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


def dense_weight(linear: Any) -> Tensor:
    """Return a linear's weight, (out_features, in_features), detached, in the host's order of channels.

    A packed one is unpacked by what every host has, its forward: unit vectors give the weight's columns. Where it
    quantizes its inputs too, the columns are as exact as those.
    """
    if not is_packed(linear):
        weight: Tensor = linear.weight.detach()
        return weight
    into, device, dtype = linear_sizes(linear)[0], _device(linear), _compute_dtype(linear)
    forward = super(PackedElasticLinear, linear).forward if isinstance(linear, PackedElasticLinear) else linear.forward
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


def _device(linear: nn.Module) -> torch.device | None:
    return next(each.device for each in (*linear._parameters.values(), *linear._buffers.values()) if each is not None)


def _compute_dtype(linear: nn.Module) -> torch.dtype:
    stored = getattr(linear, "weight", None)
    return stored.dtype if isinstance(stored, Tensor) and stored.dtype in DENSE else torch.float32


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Exchange a module's class, also where accelerate has put a hook in front of its forward."""
    module.__class__ = cls
    if "_old_forward" in vars(module):  # what accelerate's hook calls
        vars(module)["_old_forward"] = MethodType(cls.forward, module)


@cache
def _packed_class(host: type[nn.Module]) -> type[nn.Module]:
    return type(f"Elastic{host.__name__}", (PackedElasticLinear, host), {})
