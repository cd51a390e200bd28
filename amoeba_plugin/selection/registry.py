"""Objectives, importances and depth selectors by the names that recipes give them."""

from __future__ import annotations

from amoeba_plugin.plugins.manager import named
from amoeba_plugin.selection.depth.task import DepthSelector
from amoeba_plugin.selection.importance import GroupImportance, Importance
from amoeba_plugin.selection.objectives import Objective


def importance_named(name: str) -> Importance | GroupImportance:
    """Return the importance of that name, or raise :class:`PluginError` with the names that exist."""
    found: Importance | GroupImportance = named("importance", "amoeba_importances", name)
    return found


def objective_named(name: str) -> Objective:
    """Return the objective of that name, or raise :class:`PluginError` with the names that exist."""
    found: Objective = named("objective", "amoeba_objectives", name)
    return found


def depth_selector_named(name: str) -> DepthSelector:
    """Return the depth selector of that name, or raise :class:`PluginError` with the names that exist."""
    found: DepthSelector = named("depth selector", "amoeba_depth_selectors", name)
    return found
