"""What SMOL takes from PEFT's private parts, in one place (contract test: ``tests/smol/test_host.py``).

What differs between its versions is in ``runtime/compat.py``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    quantization_extra_repr,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import QuantizationBackend

from amoeba_plugin.errors import PluginError
from amoeba_plugin.runtime import compat

NoMatchingPeftModuleError = compat.no_match_error()
SAVES_BIASES = compat.saves_biases()

__all__ = [
    "DEFAULT_TARGETS",
    "SAVES_BIASES",
    "BaseTuner",
    "BaseTunerLayer",
    "NoMatchingPeftModuleError",
    "QuantizationBackend",
    "check_adapters_to_merge",
    "device_and_dtype",
    "extend_peft_type",
    "get_quantization_kwargs",
    "layer_sizes",
    "pattern_value",
    "quantization_extra_repr",
    "register",
    "resolve_quantization_backend",
    "undo_cpu_layout",
]


def extend_peft_type(name: str) -> PeftType:
    """Return the member ``name`` of PEFT's enum of methods, adding it first when PEFT does not know it.

    PEFT wants a real member (it reads ``.value`` and iterates over the enum) and has no way to add one. The steps are
    those of ``enum.EnumMeta`` itself; they hold on Python 3.10 to 3.13.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_class: type[Any], model_class: type[Any]) -> None:
    """Register a tuner with PEFT under ``name`` (lower case); doing it twice changes nothing.

    Raises:
        PluginError: If another package registered the name first.
    """
    peft_type = extend_peft_type(name.upper())
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if registered is model_class:
        return
    if registered is not None:
        raise PluginError(
            f"the PEFT method '{name}' is registered by {registered.__module__}.{registered.__qualname__}; "
            "only one package can provide it, so uninstall the other one"
        )
    untested = compat.untested_peft()
    if untested is not None:
        warnings.warn(
            f"PEFT {untested} is outside the versions SMOL was tested with ({', '.join(compat.TESTED_PEFT)}); "
            "if something fails, install one of them",
            stacklevel=2,
        )
    # transformers' delete_adapter computes the prefix as value.lower() + "_"
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=f"{name}_")


#: Architecture -> modules that LoRA targets by default; PEFT's own table, so that it follows PEFT.
DEFAULT_TARGETS: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def pattern_value(pattern: dict[str, Any], module_name: str, default: Any) -> Any:
    """Return the value of the first key that is the module's name, its end, or a regular expression for it."""
    names: Any = list(pattern)
    return pattern.get(get_pattern_key(names, module_name), default)


def device_and_dtype(layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Return where a base layer computes and in what type; the type is None if it is no floating-point type."""
    device, dtype = BaseTunerLayer._get_base_layer_device_and_dtype(layer, layer)
    if device is None:  # a packed layer has no weight
        device = next((parameter.device for parameter in layer.parameters()), None)
    return device, dtype if dtype is not None and dtype.is_floating_point else None


def undo_cpu_layout(layer: torch.nn.Module) -> None:
    """Undo the layout that bitsandbytes gives 4-bit weights on a CPU: PEFT reads them as if they had another."""
    if getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # bitsandbytes goes back before it hands out weights


def layer_sizes(layer: Any) -> tuple[int, int] | tuple[None, None]:
    """Return (in, out) features of a dense or quantized linear layer, (None, None) if it is no such layer."""
    if isinstance(layer, torch.nn.Linear) and not hasattr(layer, "weight"):  # packed: PEFT would look at its weight
        return layer.in_features, layer.out_features
    sizes: tuple[int, int] | tuple[None, None] = _get_in_out_features(layer)
    return sizes
