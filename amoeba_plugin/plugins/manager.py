"""Who registered what: the plugin manager, and look-ups that answer a wrong name with the right ones."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pluggy

from amoeba_plugin.errors import PluginError, did_you_mean
from amoeba_plugin.plugins.hooks import PROJECT

PACKAGE = Path(__file__).parent.parent
Read = Callable[[Any], Mapping[str, Any]]


@cache
def plugin_manager() -> pluggy.PluginManager:
    """Return the manager with the hooks of all rooms, and the plugins of entry point group ``amoeba_plugin``.

    Raises:
        PluginError: If a plugin cannot be loaded, or implements a hook that does not exist.
    """
    manager = pluggy.PluginManager(PROJECT)
    for name in modules_named("hooks"):
        manager.add_hookspecs(importlib.import_module(name))
    try:
        manager.load_setuptools_entrypoints(PROJECT)
    except Exception as error:  # a stranger's module may raise anything
        raise PluginError(
            f"a plugin of the entry point group {PROJECT} cannot be loaded ({type(error).__name__}: {error}); repair "
            "or uninstall it"
        ) from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a plugin implements an unknown hook: {error}") from error
    return manager


def modules_named(name: str) -> list[str]:
    """Return the modules of one name that the rooms have; no room is imported for it."""
    rooms = [each.name for each in pkgutil.iter_modules([str(PACKAGE)]) if each.ispkg]
    return [
        f"{PACKAGE.name}.{room}.{name}"
        for room in rooms
        if name in {each.name for each in pkgutil.iter_modules([str(PACKAGE / room)])}
    ]


def named(kind: str, hook: str, name: str) -> Any:
    """Return what is registered under a name.

    Args:
        kind: What it is, for people: "importance".
        hook: Whose implementations return mappings from names.
        name: Its name.

    Raises:
        PluginError: If nobody registered it, with the names that exist and who gave them; or if two did.
    """
    known = collected(kind, hook)
    if name not in known:
        own = set(modules_named("builtin"))
        names = (each if giver in own else f"{each} (from {giver})" for each, giver in givers(hook).items())
        raise PluginError(f"no {kind} named '{name}'.{did_you_mean(name, known)} Known: {', '.join(sorted(names))}")
    return known[name]


def collected(kind: str, hook: str, read: Read = dict) -> dict[str, Any]:
    """Return all that a hook hands over, by name.

    Args:
        kind: What it is, for people.
        hook: Its name.
        read: Makes a mapping from names of what an implementation returns.

    Raises:
        PluginError: If two plugins registered the same name, or one fails.
    """
    known: dict[str, Any] = {}
    given: dict[str, str] = {}
    for giver, entries in _entries(hook, read):
        for name, value in entries.items():
            if name in known:
                raise PluginError(
                    f"{kind} '{name}' is registered twice, by {given[name]} and by {giver}; uninstall one of them"
                )
            known[name], given[name] = value, giver
    return known


def givers(hook: str, read: Read = dict) -> dict[str, str]:
    """Return who handed what over, by name: a built-in module, or a plugin's name."""
    return {name: giver for giver, entries in _entries(hook, read) for name in entries}


def _entries(hook: str, read: Read) -> Iterator[tuple[str, Mapping[str, Any]]]:
    manager = plugin_manager()
    _register_builtin(manager, hook)
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        try:
            entries = read(implementation.function())
        except Exception as error:  # a stranger's code may raise anything
            raise PluginError(
                f"the plugin {implementation.plugin_name} fails in {hook} ({type(error).__name__}: {error}); repair, "
                "update or uninstall it"
            ) from error
        yield implementation.plugin_name, entries


def _register_builtin(manager: pluggy.PluginManager, hook: str) -> None:
    """Register what the room of a hook brings itself, once that is asked for: to import it takes seconds."""
    specified = getattr(manager.hook, hook).spec.namespace.__name__
    name = f"{specified.rpartition('.')[0]}.builtin"
    if not manager.has_plugin(name) and name in modules_named("builtin"):
        manager.register(importlib.import_module(name), name)
