"""The markers of hooks, and the hook by which commands are handed over.

A plugin is a module with functions of the names that the rooms' ``hooks.py`` specify, marked ``@hookimpl`` and
announced as an entry point of the group ``amoeba_plugin``. A function may leave out arguments it does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pluggy

PROJECT = "amoeba_plugin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def amoeba_commands() -> Mapping[str, Callable[..., None]]:  # type: ignore[empty-body]
    """Return commands of ``amoeba`` by name: functions whose annotations Typer reads, and whose docstring is the help.

    They are asked for whenever ``amoeba`` starts: import what takes long inside of them.
    """
