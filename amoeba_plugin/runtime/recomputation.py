"""Gradient checkpointing of layers that do not always compute the same: what is recomputed is what was run.

The recomputation happens in the backward pass, when other code may have set another state meanwhile. So whoever keeps
such a state says, each time that a layer is run, how to bring it back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn

from amoeba_plugin.runtime.compat import exchange_checkpointing

#: Called when a layer is run; what it returns is called for a context in which the layer would run the same again.
Hold = Callable[[], Callable[[], AbstractContextManager[None]]]


@dataclass(frozen=True, eq=False)
class AsItWasRun:
    """Runs a layer as ``checkpoint`` does, and recomputes it in the state that ``hold`` found then.

    It is copied and pickled with the model, so that ``hold`` must be something that can be.
    """

    checkpoint: Callable[..., Any]
    hold: Hold

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        if torch.compiler.is_compiling():  # the state is a constant or an input of the graph, backward included
            return self.checkpoint(layer, *args, **kwargs)
        held = self.hold()

        def run(*args: Any, **kwargs: Any) -> Any:
            with held():
                return layer(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)


class NotOfCopies:
    """A ``hold`` that is a method of something outside the model; in a copy of the model alone it holds nothing."""

    def __init__(self, hold: Hold | None = None) -> None:
        self._method = None if hold is None else WeakMethod(hold)  # the model shall not keep it alive

    def __call__(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what the method returns."""
        hold = None if self._method is None else self._method()
        return nullcontext if hold is None else hold()

    def __deepcopy__(self, memo: dict[int, Any]) -> NotOfCopies:
        method: Any = None if self._method is None else self._method()
        owner = None if method is None else memo.get(id(method.__self__))  # that is copied with the model
        return NotOfCopies() if owner is None else NotOfCopies(getattr(owner, method.__name__))

    def __reduce__(self) -> tuple[type[NotOfCopies], tuple[()]]:
        return NotOfCopies, ()


def recompute_as_run(hold: Hold, model: nn.Module, *_: object) -> None:
    """Let gradient checkpointing, where it is on, recompute the layers of a model in the state they were run in.

    To be called before every forward, for example as a hook: checkpointing is switched on at any time.

    Args:
        hold: Takes the state when a layer is run.
        model: With everything below it.
    """
    if not model.training or torch.compiler.is_compiling():
        return
    exchange_checkpointing(model, lambda function: function if _holds(function, hold) else AsItWasRun(function, hold))


def _holds(function: Callable[..., Any], hold: Hold) -> bool:
    while isinstance(function, AsItWasRun):
        if function.hold == hold:
            return True
        function = function.checkpoint
    return False
