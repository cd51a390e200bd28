"""Exits: prefix depths at which a model can stop, each behind a norm of its own and before the model's own head.

(Edge-LLM, arXiv:2406.15758, has a head per exit, each as large as the vocabulary; a norm that starts as a copy of the
final one, as EE-Tuning begins its exits, arXiv:2402.00518, lets all share the model's.) The exit behind the last layer
has the model's own norm. A prefix depth is not the depth of a subnet, whose layers may be any.

What an exit computes below its own layers, those down to the exit below it, is one of two things. The layers of the
base without an adapter, as in Edge-LLM's code: exits are then branches that do not disturb one another. Or, *stacked*,
the layers as they were tuned for the exits below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.errors import ArchitectureError, ShapeError
from amoeba_plugin.models.adapter import copy_config, text_model
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.runtime.compat import switch_adapters
from amoeba_plugin.runtime.module_calls import answering
from amoeba_plugin.selection.hidden_states import watched

EXIT_DEPTHS = "exit_depths"
STACKED_NORMS, BRANCH_NORMS = "exit_norms", "branch_norms"


class Begun(NamedTuple):
    """A forward that has come to a layer."""

    first: int  # the layer that runs next
    states: Tensor  # (batch, positions, hidden), what comes into it
    in_tuples: bool  # layers return their states as the first of several values


class Exits:
    """The exits of a model, of which one can be active; between uses the model is whole, with all of its adapter.

    The norms are modules of the model, ``branch_norms.DEPTH`` (``exit_norms.DEPTH`` of stacked exits); they are saved
    with it, or with an adapter that has :attr:`modules_to_save`. Its configuration says ``exit_depths``.

    Args:
        model: A causal LM; gets the norms that it lacks, in place.
        depths: Of the exits, in layers.
        stacked: Layers below those of an exit compute as they were tuned, and not as the base.

    Attributes:
        depths: Ascending.
        layers: All of the model's.

    Raises:
        ShapeError: If there is no such depth.
        ArchitectureError: If the model has no norm behind its last layer.
    """

    def __init__(self, model: PreTrainedModel, depths: Sequence[int], stacked: bool = False) -> None:
        self.stacked = stacked
        self.model, self.adapter = model, architecture_of(model.config)
        self.layers: tuple[nn.Module, ...] = tuple(self.adapter.layers(model))
        self.depths = require_depths(depths, len(self.layers))
        self.config = copy_config(model.config)
        self._decoder = self.adapter.decoder(model)
        final = getattr(self._decoder, self.adapter.final_norm, None)
        if not isinstance(final, nn.Module):
            raise ArchitectureError(
                f"this {type(model).__name__} has no norm behind its last layer, which exits start from a copy of; "
                "take a model that has one"
            )
        self._final_norm, self._stop = final, (len(self.layers), 0)
        self._name = STACKED_NORMS if stacked else BRANCH_NORMS
        if not hasattr(model, self._name):
            model.add_module(self._name, nn.ModuleDict())
        for depth in self.depths:
            if depth < len(self.layers) and str(depth) not in self._norms:
                self._norms[str(depth)] = copy.deepcopy(final)
        setattr(model.config, EXIT_DEPTHS, list(self.depths))

    @property
    def _norms(self) -> nn.ModuleDict:
        norms = self.model.get_submodule(self._name)
        assert isinstance(norms, nn.ModuleDict)
        return norms

    @property
    def modules_to_save(self) -> list[str]:
        """What an adapter's configuration says in ``modules_to_save``, so that its file has the exits' norms."""
        return [f"{self._name}.{depth}" for depth in self.depths if depth < len(self.layers)]

    def norm(self, depth: int) -> nn.Module:
        """Return the norm of an exit; an adapter that saves it has put its own in the place."""
        return self._final_norm if depth == len(self.layers) else self._norms[str(depth)]

    def remove(self) -> None:
        """Take the norms, and what the configuration says, off the model again: it is the exit behind all layers."""
        delattr(self.model, self._name)
        delattr(self.model.config, EXIT_DEPTHS)

    def branch(self, depth: int) -> int:
        """Return the first layer that an exit computes with its adapter: that behind the exit below it, or 0."""
        if self.stacked:
            return 0
        return max((other for other in self.depths if other < depth), default=0)

    @contextmanager
    def active(self, depth: int) -> Iterator[PreTrainedModel]:
        """Let the model compute what an exit does for a block of code; it is as it was afterwards.

        Args:
            depth: One of :attr:`depths`.
        """
        with self._stopped(depth, self.branch(depth)):
            yield self.model

    @contextmanager
    def _stopped(self, depth: int, base: int) -> Iterator[None]:
        """Let the model stop behind its first layers, some of which compute without an adapter."""
        before = self._stop
        self._set(depth, base)
        try:
            yield
        finally:
            self._set(*before)

    @contextmanager
    def resumed(self, depth: int, first: int, states: Tensor, in_tuples: bool) -> Iterator[PreTrainedModel]:
        """Let the model stop behind its first ``depth`` layers, of which the first ones do not run.

        Args:
            depth: As in :meth:`active`.
            first: The layer that runs first.
            states: (batch, positions, hidden), what comes into it.
            in_tuples: Whether layers return their states as the first of several values.
        """
        with self.active(depth), self._answered(first, states, in_tuples):
            yield self.model

    @contextmanager
    def _answered(self, first: int, states: Tensor, in_tuples: bool) -> Iterator[None]:
        """Let the first layers answer with what comes into the one behind them, and not run."""
        with ExitStack() as stack:
            for layer in self.layers[:first]:
                stack.enter_context(answering(layer, lambda *_, **__: (states,) if in_tuples else states))
            yield

    def begun(self, inputs: Mapping[str, Any]) -> list[Begun | None]:
        """Run the model once as far as all exits have in common; return where each goes on, ``None``: at the start.

        Stacked exits have only their norm and the head left.
        """
        starts = [depth if self.stacked else self.branch(depth) for depth in self.depths]
        needed = sorted({start for start in starts if start})
        states, in_tuples = self.states(inputs, needed) if needed else ([], False)
        at = dict(zip(needed, states, strict=True))
        return [Begun(start, at[start], in_tuples) if start else None for start in starts]

    def going_on(self, depth: int, begun: Begun | None) -> AbstractContextManager[PreTrainedModel]:
        """Let the model compute what an exit does from where it has come to, for a block of code."""
        return self.active(depth) if begun is None else self.resumed(depth, *begun)

    def states(
        self, inputs: Mapping[str, Any], depths: Sequence[int], begun: Begun | None = None
    ) -> tuple[list[Tensor], bool]:
        """Run the model up to the deepest of some depths, and return what comes out of each for exits above it.

        That is what the layers give without an adapter, unless exits are stacked.

        Args:
            inputs: Of the model's forward, without labels.
            depths: In layers, ascending, at least 1.
            begun: Where to go on; ``None``: from the first layer.

        Returns:
            States, (batch, positions, hidden) each, and whether layers return them as the first of several values.
        """
        with self._stopped(depths[-1], 0 if self.stacked else depths[-1]), ExitStack() as stack:
            stack.enter_context(nullcontext() if begun is None else self._answered(*begun))
            flows = [stack.enter_context(watched(self.layers[depth - 1])) for depth in depths]
            in_tuples = stack.enter_context(noting_tuples(self.layers[0]))
            self._decoder(**inputs, use_cache=False)
        return [flow[0][1] for flow in flows], in_tuples[0]

    def _set(self, depth: int, base: int) -> None:
        for number in range(min(base, self._stop[1]), max(base, self._stop[1])):
            switch_adapters(self.layers[number].modules(), on=number >= base)
        norm = self.norm(depth) if depth in self.depths else self._final_norm
        self.adapter.set_layers(self.model, self.layers[:depth], range(depth), self.config)
        setattr(self._decoder, self.adapter.final_norm, norm)
        self._stop = (depth, base)


@contextmanager
def noting_tuples(layer: nn.Module) -> Iterator[list[bool]]:
    """Note, at every call of a layer, whether it returns its states as the first of several values."""
    kinds: list[bool] = []
    handle = layer.register_forward_hook(lambda _module, _args, output: kinds.append(not isinstance(output, Tensor)))
    try:
        yield kinds
    finally:
        handle.remove()


def attach_exits(model: nn.Module, depths: Sequence[int], stacked: bool = False) -> Exits:
    """Give a model exits, or find those that it has, inside an adapter too.

    Raises:
        ShapeError: If there is no such depth.
        ArchitectureError: If the model is no causal LM that is supported.
    """
    inner = text_model(model)
    assert isinstance(inner, PreTrainedModel)
    return Exits(inner, depths, stacked)


def require_depths(depths: Sequence[int], layers: int) -> tuple[int, ...]:
    """Return the depths of exits, ascending.

    >>> require_depths([4, 2], 4)
    (2, 4)

    Raises:
        ShapeError: If there are none, one is not among the layers, or comes twice.
    """
    found = tuple(sorted(depths))
    if not found or len(set(found)) < len(found) or not all(1 <= depth <= layers for depth in found):
        asked = ", ".join(map(str, depths)) or "none"
        raise ShapeError(f"exits at depths {asked}: give different ones from 1 to {layers}, the layers of this model")
    return found
