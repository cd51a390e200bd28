"""Whether what a recipe quantizes can be quantized so: group sizes against the inputs of the subnet's linears."""

from __future__ import annotations

from collections.abc import Iterator

from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from transformers import PreTrainedModel

from amoeba_plugin.deployment.schemes import group_size
from amoeba_plugin.errors import RecipeError


def require_divisible(quantization: QuantizationConfig, model: PreTrainedModel, least: bool) -> None:
    """Refuse groups that do not divide the inputs of a linear.

    Args:
        quantization: Of one modifier.
        model: What it will see, without weights.
        least: Whether the model's sizes are only the least that there may be.

    Raises:
        RecipeError: Naming the linears and what would fit.
    """
    for scheme in quantization.config_groups.values():
        size = group_size(scheme)
        odd = {} if size is None else _undivided(scheme, quantization.ignore or [], size, model)
        if size is not None and odd:
            raise RecipeError(_advice(size, odd, least))


def _undivided(scheme: QuantizationScheme, ignore: list[str], size: int, model: PreTrainedModel) -> dict[str, int]:
    """Return inputs that groups do not divide, by the linear's name, which is the same in every layer."""
    odd: dict[str, int] = {}
    for path, module in match_named_modules(model, scheme.targets, ignore):
        columns = getattr(module, "in_features", size)
        if columns % size:
            odd[path.rpartition(".")[2]] = columns
    return odd


def _advice(size: int, odd: dict[str, int], least: bool) -> str:
    any_of = "any multiple of " if least else ""
    where = ", ".join(f"{linear} ({any_of}{columns} inputs)" for linear, columns in odd.items())
    common = max(each for each in _divisors(size) if all(columns % each == 0 for columns in odd.values()))
    smaller = f"or group_size to {common} (in config_groups), " if common > 1 else ""
    return (
        f"it quantizes in groups of {size} input channels, which do not divide {where}; set "
        f"WidthShrinkingModifier.round_to to a multiple of {size}, {smaller}or a scheme without groups (W8A8), or add "
        "these modules to ignore"
    )


def _divisors(number: int) -> Iterator[int]:
    return (each for each in range(1, number + 1) if number % each == 0)
