"""PEFT's view of linears that compressed-tensors keeps packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from amoeba_plugin.models.compressed_linear import CompressedLinear, unpack
from amoeba_plugin.smol.host import QuantizationBackend


class PackedBackend(QuantizationBackend):
    """Lets PEFT merge: into a dense weight, because packing it again with the old scales would lose the update."""

    supports_merge = True
    backend_name = "compressed-tensors"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """Return the dense weight, (out, in)."""
        return unpack(base_layer) if isinstance(base_layer, CompressedLinear) else base_layer.weight.data  # type: ignore

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Make the base layer an ordinary dense one with this weight."""
        layer = peft_layer.get_base_layer()
        if isinstance(layer, CompressedLinear):
            for name in [name for name in layer._parameters if name.startswith("weight_")]:
                del layer._parameters[name]
            del layer.quantization_scheme, layer.quantization_status
            layer.__class__ = nn.Linear  # type: ignore[assignment]
        layer.weight = nn.Parameter(weight_data, requires_grad=False)
