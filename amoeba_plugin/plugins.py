"""Who registered what: the plugin manager, and look-ups that answer a wrong name with the right ones."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

import pluggy

from amoeba_plugin import hookspecs
from amoeba_plugin.errors import ArchitectureError, PluginError, did_you_mean

if TYPE_CHECKING:
    from amoeba_plugin.architecture import ArchitectureAdapter
    from amoeba_plugin.depth_selectors import DepthSelector
    from amoeba_plugin.importance import GroupImportance, Importance
    from amoeba_plugin.objectives import Objective

BUILT_IN = (
    "amoeba_plugin.architectures.builtin",
    "amoeba_plugin.depth_selectors",
    "amoeba_plugin.importance",
    "amoeba_plugin.objectives",
)


@cache
def plugin_manager() -> pluggy.PluginManager:
    """Return the manager with the built-in plugins and those of entry point group ``amoeba_plugin``.

    Raises:
        PluginError: If a plugin implements a hook that does not exist.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in BUILT_IN:
        manager.register(importlib.import_module(name), name)
    manager.load_setuptools_entrypoints(hookspecs.PROJECT)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a plugin implements an unknown hook: {error}") from error
    return manager


def architecture_for(model_type: str) -> ArchitectureAdapter:
    """Return the adapter for ``config.model_type``.

    Raises:
        ArchitectureError: If nobody registered it; the message names the supported ones.
    """
    adapters = _collect(
        "architecture", "amoeba_architectures", lambda given: {t: a for a in given for t in a.model_types}
    )
    if model_type not in adapters:
        raise ArchitectureError(
            f"architecture '{model_type}' is not supported; supported are {', '.join(sorted(adapters))}. "
            "A plugin can add one by the hook amoeba_architectures"
        )
    adapter: ArchitectureAdapter = adapters[model_type]
    return adapter


def importance_named(name: str) -> Importance | GroupImportance:
    """Return the importance of that name, or raise :class:`PluginError` with the names that exist."""
    found: Importance | GroupImportance = _named("importance", "amoeba_importances", name)
    return found


def objective_named(name: str) -> Objective:
    """Return the objective of that name, or raise :class:`PluginError` with the names that exist."""
    found: Objective = _named("objective", "amoeba_objectives", name)
    return found


def depth_selector_named(name: str) -> DepthSelector:
    """Return the depth selector of that name, or raise :class:`PluginError` with the names that exist."""
    found: DepthSelector = _named("depth selector", "amoeba_depth_selectors", name)
    return found


def _named(kind: str, hook: str, name: str) -> Any:
    known = _collect(kind, hook, dict)
    if name not in known:
        names = (each if giver in BUILT_IN else f"{each} (from {giver})" for each, giver in _givers(hook, dict).items())
        raise PluginError(f"no {kind} named '{name}'.{did_you_mean(name, known)} Known: {', '.join(sorted(names))}")
    return known[name]


def _collect(kind: str, hook: str, read: Any) -> dict[str, Any]:
    known: dict[str, Any] = {}
    givers: dict[str, str] = {}
    for giver, entries in _entries(hook, read):
        for name, value in entries.items():
            if name in known:
                raise PluginError(
                    f"{kind} '{name}' is registered twice, by {givers[name]} and by {giver}; uninstall one of them"
                )
            known[name], givers[name] = value, giver
    return known


def _givers(hook: str, read: Any) -> dict[str, str]:
    return {name: giver for giver, entries in _entries(hook, read) for name in entries}


def _entries(hook: str, read: Any) -> list[tuple[str, dict[str, Any]]]:
    implementations = getattr(plugin_manager().hook, hook).get_hookimpls()
    return [(implementation.plugin_name, read(implementation.function())) for implementation in implementations]
