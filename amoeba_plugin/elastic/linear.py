"""Linears that compute with a part of their channels: of dense weights a slice, of packed ones the whole product.

A linear is *packed* where a host (bitsandbytes, torchao, GPTQ, ...) keeps its weight in a form of its own, which can be
neither sliced nor reordered. It then computes all of its product, as the host does; what is active is picked from the
output and put in its place in the input. That saves neither time nor memory, but everything around it sees the sizes
and the order of channels that it would see of a dense linear.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amoeba_plugin.errors import AdapterError
from amoeba_plugin.models.packed_linear import dense_weight, linear_device, linear_sizes
from amoeba_plugin.models.partial_linear import NOT_MERGED, PartialLinear
from amoeba_plugin.models.slices import take


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
        if self.repaired is not None:
            bias = None if self.bias is None else take(self.bias, self.active_rows)
            weight = self.repaired_weight(lambda: self.weight)  # FSDP casts parameters, and no buffers
            return functional.linear(input, weight.to(self.weight.dtype), bias)
        outputs = [
            functional.linear(
                input, self.weight[rows, : self.active_in], None if self.bias is None else self.bias[rows]
            )
            for rows in self.active_rows
        ]
        return self._compensated(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1))

    def whole_weight(self) -> Tensor:
        """Return the weight itself, detached."""
        return self.weight.detach()

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

    keeps_packed = True
    row_order: Tensor
    column_order: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # a host merging an adapter, whose channels are in another order than the weight's
            raise AdapterError(f"a {type(self).__name__} keeps its weight packed, {NOT_MERGED}")
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., active_in) to (..., active_out); a repaired weight is dense, and the packed one not looked at."""
        if self.repaired is not None:
            return self._repaired_forward(input)
        # gather and scatter, because index_select and index_copy take several times as long on a CPU
        columns = self.column_order[: self.active_in].expand(input.shape)
        whole = input.new_zeros(*input.shape[:-1], linear_sizes(self)[0]).scatter(-1, columns, input)
        output = self.host_forward(whole)
        rows = take(self.row_order, self.active_rows)
        return self._compensated(output.gather(-1, rows.expand(*output.shape[:-1], -1)))

    def _repaired_forward(self, input: Tensor) -> Tensor:
        bias: Tensor | None = getattr(self, "bias", None)
        if bias is not None:
            bias = take(bias[self.row_order], self.active_rows).to(input.dtype)
        weight = self.repaired_weight(self.whole_weight)
        return functional.linear(input, weight.to(input.dtype), bias)

    def host_forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), in the host's order of channels."""
        output: Tensor = super().forward(input)
        return output

    def whole_weight(self) -> Tensor:
        """Return the weight unpacked and in order."""
        return dense_weight(self)[self.row_order][:, self.column_order]

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
    device = linear_device(linear)
    linear.register_buffer("row_order", torch.arange(out, device=device), persistent=False)
    linear.register_buffer("column_order", torch.arange(into, device=device), persistent=False)
    return linear


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Exchange a module's class, also where accelerate has put a hook in front of its forward."""
    module.__class__ = cls
    if "_old_forward" in vars(module):  # what accelerate's hook calls
        vars(module)["_old_forward"] = MethodType(cls.forward, module)


@cache
def _packed_class(host: type[nn.Module]) -> type[nn.Module]:
    return type(f"Elastic{host.__name__}", (PackedElasticLinear, host), {})
