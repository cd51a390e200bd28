"""Quantization schemes of compressed-tensors: groups that share a scale, and experts that transformers reads back.

Of a quantized checkpoint, transformers multiplies the experts out as it loads them, in
``transformers.integrations.compressed_tensors.DecompressExperts``. It does that for packed integers with scales and
nothing else. Tried with transformers 5.17 and refused here: zero points (W4A16_ASYM) and integers with quantized
activations (W8A8), which fail when they are loaded; FP8, whose activations it does not quantize then, so that the
outputs are others; experts left whole beside quantized attention, or quantized in parts, whose weights it looks for
under the names of packed ones and does not find.
"""

from __future__ import annotations

from collections.abc import Sequence

from compressed_tensors.quantization import ActivationOrdering, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.runtime import compat


def group_size(scheme: QuantizationScheme) -> int | None:
    """Return how many inputs of a linear share a scale; ``None`` where that is not by groups."""
    weights = scheme.weights
    if weights is None or weights.group_size is None or weights.group_size < 1:
        return None
    return int(weights.group_size)


def require_readable(configs: Sequence[QuantizationConfig], model: PreTrainedModel) -> None:
    """Refuse a quantization of experts that transformers would not read back as it was.

    Args:
        configs: Of all quantization modifiers of a recipe.
        model: From :func:`take_apart`.

    Raises:
        ArchitectureError: Naming what cannot be read and what can.
    """
    schemes = [(scheme, config.ignore) for config in configs for scheme in config.config_groups.values()]
    quantized = {path for scheme, ignore in schemes for path, _ in match_named_modules(model, scheme.targets, ignore)}
    whole = sorted(
        path for path, module in model.named_modules() if _in_experts(path, module) and path not in quantized
    )
    wrong = next((reason for scheme, _ in schemes if (reason := unreadable(scheme))), None)
    if not compat.reads_packed_experts():
        wrong = "with the transformers installed, which is too old; 5.17 does"
    if wrong is None and len(schemes) > 1:
        wrong = "several schemes, of which it takes one for all experts"
    if wrong is None and whole:
        wrong = f"experts that are not quantized ({whole[0]}, ...)"
    if wrong is not None:
        raise ArchitectureError(
            f"of a quantized {model.config.model_type} transformers reads experts that are packed integers "
            f"with scales, not {wrong}. Quantize all linears in one scheme of weights alone, symmetric: W4A16 or W8A16 "
            "(ignore: [lm_head]), or end the recipe at SubnetExtractionModifier; the subnet is an ordinary checkpoint, "
            "which your server's own tools quantize"
        )


def _in_experts(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and ".experts." in path


def unreadable(scheme: QuantizationScheme) -> str | None:
    """Return what of a scheme transformers does not read back in experts, or ``None``."""
    weights = scheme.weights
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "quantized activations"
    if weights is None or weights.type != "int":
        return "weights in floating point"
    if not weights.symmetric:
        return "zero points"
    if weights.strategy not in ("group", "channel"):
        return f"scales by {weights.strategy}"
    if weights.actorder == ActivationOrdering.GROUP:
        return "groups in order of activations"
    return None
