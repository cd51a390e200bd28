"""Linears that compressed-tensors keeps packed, used as they are and unpacked one at a time.

transformers leaves such a layer an ``nn.Linear`` without a ``weight`` and unpacks the whole model at the first forward.
Here the weights stay packed: each product unpacks its own weight, once for the forward and once for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unpack(layer: nn.Module) -> Tensor:
    """Return the weight of a packed layer, (out, in), in the type of its scales."""
    # a host that not everybody has
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils import get_direct_state_dict

    scheme: Any = layer.quantization_scheme
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    weight: Tensor = compressor.decompress(get_direct_state_dict(layer), scheme)["weight"]
    return weight


class UnpackedProduct(torch.autograd.Function):
    """``x W^T`` with a packed, frozen W that is not kept between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        """Map (..., in) to (..., out)."""
        ctx.layer = layer
        return F.linear(x, unpack(layer).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """Map the gradient (..., out) to (..., in)."""
        (gradient,) = gradients
        return gradient @ unpack(ctx.layer).to(gradient.dtype), None


class CompressedLinear(nn.Linear):
    """A linear whose weight is packed; made from the host's layer by exchanging its class."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        product: Tensor = UnpackedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


def is_compressed(module: nn.Module) -> bool:
    """Tell whether compressed-tensors holds the module's weight packed."""
    return isinstance(module, nn.Linear) and "weight_packed" in module._parameters


def keep_packed(model: nn.Module) -> None:
    """Make the packed linears of a model usable as they are, and stop the host from unpacking them all.

    A model with a packed layer that also quantizes its activations is left to the host: it becomes dense at the first
    forward.
    """
    packed: list[Any] = [module for module in model.modules() if is_compressed(module)]
    if any(
        layer.quantization_scheme.input_activations or layer.quantization_scheme.output_activations for layer in packed
    ):
        return
    for layer in packed:
        layer.__class__ = CompressedLinear
        layer.__dict__.pop("forward", None)  # the host's, which quantizes a dense weight
    hook = getattr(model, "ct_decompress_hook", None)
    if packed and hook is not None:
        hook.remove()
        del model.ct_decompress_hook
