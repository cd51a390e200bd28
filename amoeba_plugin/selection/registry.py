"""Objectives, importances, repairs, depth selectors and sensitivities by the names that recipes give them."""

from __future__ import annotations

from amoeba_plugin.plugins.manager import named
from amoeba_plugin.selection.depth.task import DepthSelector
from amoeba_plugin.selection.importance import AnyImportance
from amoeba_plugin.selection.layerwise.task import Sensitivity
from amoeba_plugin.selection.objectives import Objective
from amoeba_plugin.selection.repair.width import Repair


def importance_named(name: str) -> AnyImportance:
    """Return the importance of that name, or raise :class:`PluginError` with the names that exist."""
    found: AnyImportance = named("importance", "amoeba_importances", name)
    return found


def objective_named(name: str) -> Objective:
    """Return the objective of that name, or raise :class:`PluginError` with the names that exist."""
    found: Objective = named("objective", "amoeba_objectives", name)
    return found


def repair_named(name: str) -> Repair:
    """Return the repair of that name, or raise :class:`PluginError` with the names that exist."""
    found: Repair = named("repair", "amoeba_repairs", name)
    return found


def depth_selector_named(name: str) -> DepthSelector:
    """Return the depth selector of that name, or raise :class:`PluginError` with the names that exist."""
    found: DepthSelector = named("depth selector", "amoeba_depth_selectors", name)
    return found


def sensitivity_named(name: str) -> Sensitivity:
    """Return the sensitivity of that name, or raise :class:`PluginError` with the names that exist."""
    found: Sensitivity = named("sensitivity", "amoeba_sensitivities", name)
    return found
