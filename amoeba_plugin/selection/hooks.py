"""The hooks by which objectives, importances, repairs, depth selectors and sensitivities come in.

Built-in ones use the same door.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from amoeba_plugin.plugins.hooks import hookspec

if TYPE_CHECKING:
    from amoeba_plugin.selection.depth.task import DepthSelector
    from amoeba_plugin.selection.importance import AnyImportance
    from amoeba_plugin.selection.layerwise.task import Sensitivity
    from amoeba_plugin.selection.objectives import Objective
    from amoeba_plugin.selection.repair.width import Repair


@hookspec
def amoeba_importances() -> Mapping[str, AnyImportance]:  # type: ignore[empty-body]
    """Return importances by the name that ``WidthShrinkingModifier.importance`` takes."""


@hookspec
def amoeba_objectives() -> Mapping[str, Objective]:  # type: ignore[empty-body]
    """Return objectives by the name that ``DepthShrinkingModifier.objective`` takes."""


@hookspec
def amoeba_repairs() -> Mapping[str, Repair]:  # type: ignore[empty-body]
    """Return repairs by the name that ``WidthShrinkingModifier.repair`` takes."""


@hookspec
def amoeba_depth_selectors() -> Mapping[str, DepthSelector]:  # type: ignore[empty-body]
    """Return depth selectors by the name that ``DepthShrinkingModifier.selector`` takes."""


@hookspec
def amoeba_sensitivities() -> Mapping[str, Sensitivity]:  # type: ignore[empty-body]
    """Return sensitivities by the name that ``LayerwisePolicyModifier.sensitivity`` takes."""
