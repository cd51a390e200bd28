"""The hooks by which architectures, importances, objectives and depth selectors are handed over.

Built-in ones use the same door. A plugin is a module with functions of these names, marked ``@hookimpl`` and announced
as an entry point of the group ``amoeba_plugin``. A function may leave out arguments it does not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from amoeba_plugin.architecture import ArchitectureAdapter
    from amoeba_plugin.depth_selectors import DepthSelector
    from amoeba_plugin.importance import GroupImportance, Importance
    from amoeba_plugin.objectives import Objective

PROJECT = "amoeba_plugin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def amoeba_architectures() -> Sequence[ArchitectureAdapter]:  # type: ignore[empty-body]
    """Return adapters; each names the ``model_types`` it serves."""


@hookspec
def amoeba_importances() -> Mapping[str, Importance | GroupImportance]:  # type: ignore[empty-body]
    """Return importances by the name that ``WidthShrinkingModifier.importance`` takes."""


@hookspec
def amoeba_objectives() -> Mapping[str, Objective]:  # type: ignore[empty-body]
    """Return objectives by the name that ``DepthShrinkingModifier.objective`` takes."""


@hookspec
def amoeba_depth_selectors() -> Mapping[str, DepthSelector]:  # type: ignore[empty-body]
    """Return depth selectors by the name that ``DepthShrinkingModifier.selector`` takes."""
