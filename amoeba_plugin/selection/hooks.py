"""The hooks by which objectives, importances and depth selectors are handed over; built-in ones use the same door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from amoeba_plugin.plugins.hooks import hookspec

if TYPE_CHECKING:
    from amoeba_plugin.selection.depth.task import DepthSelector
    from amoeba_plugin.selection.importance import GroupImportance, Importance
    from amoeba_plugin.selection.objectives import Objective


@hookspec
def amoeba_importances() -> Mapping[str, Importance | GroupImportance]:  # type: ignore[empty-body]
    """Return importances by the name that ``WidthShrinkingModifier.importance`` takes."""


@hookspec
def amoeba_objectives() -> Mapping[str, Objective]:  # type: ignore[empty-body]
    """Return objectives by the name that ``DepthShrinkingModifier.objective`` takes."""


@hookspec
def amoeba_depth_selectors() -> Mapping[str, DepthSelector]:  # type: ignore[empty-body]
    """Return depth selectors by the name that ``DepthShrinkingModifier.selector`` takes."""
