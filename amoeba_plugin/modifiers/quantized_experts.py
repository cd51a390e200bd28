"""Quantized experts: the names under which llm-compressor saves them, and transformers looks for them.

llm-compressor takes the experts of a layer apart into linears and saves each under its own name, such as
``experts.0.gate_proj.weight_packed``. transformers puts experts together from the names that the architecture's
original checkpoints have (Mixtral: ``experts.0.w1``), and other names it ignores: it fills the experts with random
numbers. So the names are changed while the model is saved.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

PARTS = {1: ("down_proj",), 2: ("gate_proj", "up_proj")}  # llm-compressor's names, by how many a parameter is made of


def save_experts_by_original_names(model: PreTrainedModel) -> None:
    """See to it that ``save_pretrained``, called once the host has taken experts apart, names them as the original
    checkpoints do.

    Args:
        model: As transformers loaded it; its experts are whole.
    """
    # What transformers undoes while saving; by itself it takes what loading did, nothing where a file's experts were
    # whole (save_original_format=False).
    known = get_model_conversion_mapping(model, add_legacy=False)
    vars(model)["_weight_conversions"] = [each for conversion in known for each in _without_merging(conversion)]


def _without_merging(conversion: Any) -> list[Any]:
    patterns = getattr(conversion, "_original_source_patterns", [])
    if not isinstance(conversion, WeightConverter) or not all(".experts.*." in f".{each}" for each in patterns):
        return [conversion]
    originals = [pattern.rpartition("*.")[2].removesuffix(".weight") for pattern in patterns]
    return [
        WeightRenaming(rf"\.experts\.(\d+)\.{original}\.", rf".experts.\1.{name}.")
        for original, name in zip(originals, PARTS[len(originals)], strict=True)
        if original != name
    ]
