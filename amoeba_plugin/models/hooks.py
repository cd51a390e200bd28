"""The hook by which architectures are handed over; the built-in ones use the same door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amoeba_plugin.plugins.hooks import hookspec

if TYPE_CHECKING:
    from amoeba_plugin.models.adapter import ArchitectureAdapter


@hookspec
def amoeba_architectures() -> Sequence[ArchitectureAdapter]:  # type: ignore[empty-body]
    """Return adapters; each names the ``model_types`` it serves."""
