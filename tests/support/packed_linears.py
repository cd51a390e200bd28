"""Linears whose weights are packed, made of integers, as hosts have them: one nn.Linear of its kind, one of none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amoeba_plugin.models.registry import architecture_for


class PackedLinear(nn.Linear):
    """Holds a "weight" of one column of bytes, as bitsandbytes does."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8).view(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise ValueError("the host computes with all of its weight")
        weight = self.weight.view(self.out_features, self.in_features).to(input.dtype) * self.scale
        return nn.functional.linear(input, weight, self.bias)


class IntegerLinear(nn.Module):
    """Holds buffers and no weight, and calls its sizes as GPTQ's layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8).T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        product = x @ (self.qweight.to(x.dtype) * self.scale)
        return product if self.bias is None else product + self.bias


def pack(model: Any, cls: Any = PackedLinear, skip: str = "-") -> Any:
    """Pack all linears of the decoder layers but those whose path contains ``skip``, in place; return the model."""
    for layer in architecture_for(model.config.model_type).layers(model):
        for path, module in list(layer.named_modules()):
            if type(module) is nn.Linear and skip not in path:
                parent, _, name = path.rpartition(".")
                setattr(layer.get_submodule(parent), name, cls(module))
    model.config.quantization_config = {"quant_method": "packed"}
    return model


def unpack(model: Any) -> Any:
    """Make every packed linear a dense one again, computed from its integers alone; return the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (PackedLinear, IntegerLinear)):
            if isinstance(module, PackedLinear):
                weight = module.weight.view(module.out_features, module.in_features).float() * module.scale
            else:
                weight = module.qweight.T.float() * module.scale
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            dense.weight = nn.Parameter(weight.contiguous())
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.detach().clone())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, dense)
    del model.config.quantization_config
    return model
