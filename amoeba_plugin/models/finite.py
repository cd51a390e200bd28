"""Whether a model's weights are numbers: one NaN makes everything that is measured on it NaN, or goes unseen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.module_calls import onloaded


def require_finite_weights(model: nn.Module) -> None:
    """Refuse a model with a parameter that is NaN or infinite somewhere; every parameter is read once.

    Raises:
        ArtifactError: Naming the first one.
    """
    found = not_finite(model)
    if found is not None:
        raise ArtifactError(
            f"{found} of the model is NaN or infinite somewhere, so that nothing can be measured on it; load the model "
            "in bfloat16 or float32 (float16 overflows), or copy or download it anew"
        )


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter that is NaN or infinite somewhere, or ``None``.

    Of a sharded one, this process's part is looked at; a packed one is passed over.
    """
    for path, module in model.named_modules():
        with onloaded([module]):
            for name, parameter in module._parameters.items():
                if parameter is not None and not is_finite(parameter):
                    return f"{path}.{name}" if path else name
    return None


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all elements are finite; integers are. No copy is made.

    >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, math.nan])), is_finite(torch.tensor([]))
    (True, False, True)
    """
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if not local.is_floating_point() or not local.numel() or local.device.type == "meta":
        return True
    local = local.detach().float() if local.element_size() == 1 else local.detach()  # of 8 bits there is no minimum
    least, most = torch.aminmax(local)  # NaN where any is; isfinite takes twenty times as long
    return math.isfinite(least.item()) and math.isfinite(most.item())
