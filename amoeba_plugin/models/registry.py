"""The architecture of a model, by its configuration's ``model_type``."""

from __future__ import annotations

from collections.abc import Iterable

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.plugins.manager import collected


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
