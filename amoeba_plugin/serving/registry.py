"""Ways to decide by name."""

from __future__ import annotations

from amoeba_plugin.plugins.manager import named
from amoeba_plugin.serving.deciders import Decider, DeciderOptions


def decider_named(name: str, options: DeciderOptions | None = None) -> Decider:
    """Return the decider of that name, or raise :class:`PluginError` with the names that exist."""
    found: Decider = named("decision", "amoeba_decisions", name)(options or DeciderOptions())
    return found
