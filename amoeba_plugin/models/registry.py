"""The architecture of a model, by its configuration's ``model_type``."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PretrainedConfig

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.plugins.manager import collected

# Of a model that takes images too; transformers' own ways to load its text model alone fill it with random numbers.
TEXT_ALONE = (
    "whole = AutoModelForImageTextToText.from_pretrained(MODEL); "
    "text = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.dtype); "
    "text.model, text.lm_head = whole.model.language_model, whole.lm_head; text.save_pretrained(TEXT)"
)


def architecture_of(config: PretrainedConfig) -> ArchitectureAdapter:
    """Return the adapter for a model's configuration.

    Raises:
        ArchitectureError: If nobody registered it; where a model takes more than text, and its text model is supported,
            the message tells how to get that.
    """
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    if text is not None and not is_supported(config.model_type) and is_supported(text):
        raise ArchitectureError(
            f"architecture '{config.model_type}' takes more than text and is not supported, but its text model, "
            f"'{text}', is: save that alone, and its tokenizer beside it: {TEXT_ALONE}"
        )
    return architecture_for(config.model_type)


def is_supported(model_type: str) -> bool:
    """Tell whether somebody registered an architecture."""
    return model_type in collected("architecture", "amoeba_architectures", _by_model_type)


def architecture_for(model_type: str) -> ArchitectureAdapter:
    """Return the adapter for ``config.model_type``.

    Raises:
        ArchitectureError: If nobody registered it; the message names the supported ones.
    """
    adapters = collected("architecture", "amoeba_architectures", _by_model_type)
    if model_type not in adapters:
        raise ArchitectureError(
            f"architecture '{model_type}' is not supported; supported are {', '.join(sorted(adapters))}. "
            "A plugin can add one by the hook amoeba_architectures"
        )
    adapter: ArchitectureAdapter = adapters[model_type]
    return adapter


def _by_model_type(given: Iterable[ArchitectureAdapter]) -> dict[str, ArchitectureAdapter]:
    return {model_type: adapter for adapter in given for model_type in adapter.model_types}
