"""The ways to decide that come with the package, through the same door as those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from amoeba_plugin.plugins.hooks import hookimpl
from amoeba_plugin.serving.deciders import Decider, DeciderOptions, dual_head, fixed, largest_feasible, random_feasible


@hookimpl
def amoeba_decisions() -> Mapping[str, Callable[[DeciderOptions], Decider]]:
    """Return one that reads the prompt, and those that do not."""
    return {make.__name__: make for make in (largest_feasible, fixed, random_feasible, dual_head)}
