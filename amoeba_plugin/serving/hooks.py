"""The hook by which ways to decide are handed over; the built-in ones use the same door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from amoeba_plugin.plugins.hooks import hookspec

if TYPE_CHECKING:
    from amoeba_plugin.serving.deciders import Decider, DeciderOptions


@hookspec
def amoeba_decisions() -> Mapping[str, Callable[[DeciderOptions], Decider]]:  # type: ignore[empty-body]
    """Return, by name, what makes a function from what is feasible to the decision that a request gets."""
