"""Many subnets of one model observed at once: what they have in common is computed once, layer by layer.

Where attention and MLP may go apart, each is a step of its own: the layer in which a stand-in takes the other's place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch, model_inputs
from amoeba_plugin.errors import DataError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.kept import OTHER, PARTS
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.module_calls import answering, input_device, is_offloaded, onloaded
from amoeba_plugin.runtime.peak_memory import peak_memory
from amoeba_plugin.runtime.state_store import StateStore
from amoeba_plugin.selection.depth.steps import WHOLE, Removed, RunFolds
from amoeba_plugin.selection.depth.walk import Visit, walk
from amoeba_plugin.selection.hidden_states import states_into, states_out_of
from amoeba_plugin.selection.objectives import Objective, Score
from amoeba_plugin.selection.over_ranks import joined, scores_over_ranks
from amoeba_plugin.shape import half_steps

Call = Callable[[Tensor], Any]  # a decoder layer with all its arguments but the states
TOKENS_AT_ONCE = 2**13  # beyond, one call of a layer is not faster than two
CALLS_KEPT = 8  # recorded arguments hold a mask of (rows, 1, positions, positions) where there is padding


@dataclass
class Lockstep:
    """Runs the layers of a causal LM one at a time, for many subnets at once.

    The arguments that the decoder hands to its layers beside the states are recorded, and what it does before and after
    its layers it does itself, while they answer with states that are known. ``check_contract`` tells whether a decoder
    allows it.

    Attributes:
        model: In evaluation mode, without gradients; never changed but for the time of a call.
        layers: Its decoder layers.
        decoder: The module that runs them.
        batches: What subnets are observed on.
        removable: Steps that may go: indices 0 to this - 1.
        cached: States before these steps in the whole model, by (step, batch).
        flying: States of subnets under way, by (steps removed, batch).
        stand_ins: Of all layers: attention and MLP are steps, 2 * layer and 2 * layer + 1. None: layers are.
        returns_tuples: Whether layers return their states as the first of several values.
        tokens_at_once: Of states that one call of a layer takes together.
        folds: What is added where layers are gone; ``None``: nothing. Steps are layers then.
        step_forwards: Steps run so far, counted for each state and batch.
        layer_calls: In how many calls; one takes several states.
    """

    model: PreTrainedModel
    layers: Sequence[nn.Module]
    decoder: nn.Module
    batches: Sequence[Batch]
    removable: int
    cached: StateStore
    flying: StateStore
    stand_ins: StandIns | None = None
    returns_tuples: bool = False
    tokens_at_once: int = TOKENS_AT_ONCE
    folds: RunFolds | None = None
    step_forwards: int = 0
    layer_calls: int = 0
    _calls: dict[tuple[int, int], list[Call]] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(
        cls,
        model: PreTrainedModel,
        adapter: ArchitectureAdapter,
        batches: Sequence[Batch],
        removable: int,
        cache_bytes: float,
        **options: Any,
    ) -> Iterator[Lockstep]:
        """Yield one whose states take ``cache_bytes`` of memory at most; its files vanish with the block."""
        with StateStore.of(cache_bytes / 2) as cached, StateStore.of(cache_bytes / 2) as flying:
            layers, decoder = list(adapter.layers(model)), adapter.decoder(model)
            yield cls(model, layers, decoder, batches, removable, cached, flying, **options)

    @property
    def steps_per_layer(self) -> int:
        """1, or 2 where attention and MLP are steps."""
        return 1 if self.stand_ins is None else len(PARTS)

    @property
    def num_steps(self) -> int:
        """Steps of the whole model, of which the first ``removable`` may go."""
        return self.steps_per_layer * len(self.layers)

    @property
    def layer_forwards(self) -> float:
        """Decoder layers run so far, counted for each state and batch; attention or MLP alone is half a layer."""
        return half_steps(self.step_forwards / self.steps_per_layer)

    def observe(
        self, objective: Objective, sets: Sequence[Removed], progress: Callable[[], object] = lambda: None
    ) -> list[Tensor]:
        """Return what an objective observes without each of some sets of steps; see ``Runner.observe``."""
        rows: dict[Removed, list[Tensor]] = {removed: [] for removed in sets}
        for removed, batch in self._finished(sets):
            rows[removed].append(self.observe_final(objective, removed, batch))
            progress()
        return [joined(rows[removed]) for removed in sets]

    def measure(self, objective: Objective, sets: Sequence[Removed], progress: Callable[[], object]) -> list[Score]:
        """Return the scores of sets, over all ranks, by an objective made of observations; see ``Runner.measure``."""
        return scores_over_ranks(objective, self.observe(objective, sets, progress))

    def run_layer(self, layer: int, begin: Callable[[int], object] = lambda batch: None) -> None:
        """Run all batches of the whole model through one layer, from the states before it, which stay.

        Args:
            layer: The states before it are known: it is the first, or the one before has been run or skipped.
            begin: Called with the number of every batch before.
        """
        with onloaded(self.layers[layer].modules()):
            for batch in range(len(self.batches)):
                begin(batch)
                self._visit(Visit(layer, (WHOLE,), ()), batch)

    def pass_on(self, known_by: int, layer: int, batch: int) -> None:
        """Run a batch through a layer as it is now, from the states known by a number; at first from the embeddings."""
        call = self._record(batch, 1)[layer]
        key = known_by, batch
        self.flying[key] = states_out_of(call(self.flying[key] if key in self.flying else self.cached[0, batch]))
        self.step_forwards, self.layer_calls = self.step_forwards + self.steps_per_layer, self.layer_calls + 1

    def observe_passed(self, objective: Objective, known_by: int, batch: int) -> Tensor:
        """Return an observation of the states known by a number, which are behind the last layer."""
        with self.emitting(self.flying[known_by, batch]):
            return objective.observe(self.model, self.batches[batch])

    def skip(self, layer: int, to: int) -> None:
        """Let the states before one layer be those before a later one."""
        for batch in range(len(self.batches)):
            if layer == 0:
                self._record(batch, 1)
            self.cached.rename((layer, batch), (to, batch))

    def forget(self, layers: Iterable[int]) -> None:
        """Drop the states before layers."""
        for layer in layers:
            for batch in range(len(self.batches)):
                self.cached.discard((layer, batch))

    def report(self) -> dict[str, Any]:
        """Return what was run, in how many ``layer_calls``, and most bytes held of ``states on PLACE``."""
        states = {
            f"states on {place}": self.cached.peak.get(place, 0) + self.flying.peak.get(place, 0)
            for place in {**self.cached.peak, **self.flying.peak}
        }
        return {
            "lockstep": True,
            "layer_forwards": self.layer_forwards,
            "layer_calls": self.layer_calls,
            "peak_bytes": states | peak_memory(),
        }

    def observe_final(self, objective: Objective, removed: Removed, batch: int) -> Tensor:
        """Return an observation of a subnet whose states are behind the last layer."""
        with self.emitting(self._entering(removed, self.num_steps, batch)):
            return objective.observe(self.model, self.batches[batch])

    @contextmanager
    def emitting(self, states: Tensor) -> Iterator[None]:
        """Let the last layer answer with states that are known, and those before it do nothing."""

        def last(*args: Any, **kwargs: Any) -> Any:
            if states_into(args, kwargs).shape != states.shape:
                raise DataError(
                    "the objective runs the model on something else than the batch it observes; let it override "
                    "measure in place of observe and score"
                )
            return self._returned(states)

        with ExitStack() as stack:
            for layer in self.layers[:-1]:
                stack.enter_context(answering(layer, lambda *args, **kwargs: self._returned(states_into(args, kwargs))))
            stack.enter_context(answering(self.layers[-1], last))
            yield

    def _finished(self, sets: Sequence[Removed]) -> Iterator[tuple[Removed, int]]:
        """Yield every set and batch while its states are behind the last layer."""
        streams = is_offloaded(self.model)  # then all batches meet a layer while its weights are there
        inside = {part for layer in self.layers for part in layer.modules()}
        outside = [part for part in self.model.modules() if part not in inside] if streams else []
        with onloaded(outside):
            for batches in [range(len(self.batches))] if streams else [[number] for number in range(len(self.batches))]:
                if WHOLE not in sets and any((0, number) not in self.cached for number in batches):
                    self._run([WHOLE], batches, streams)
                for some in [sets] if streams else self._portions(sets, batches[0]):
                    self._run(some, batches, streams)
                    yield from ((removed, number) for number in batches for removed in some)
                    self.flying.clear()
                for number in batches:
                    self.cached.discard((self.num_steps, number))

    def _portions(self, sets: Sequence[Removed], batch: int) -> Iterator[Sequence[Removed]]:
        """Cut many sets into portions that fit into the budget; neighbours share most."""
        size = self.cached.bytes_of((0, batch)) or 1  # nothing is known before the whole model is run, which is alone
        # at a layer, old and new states are there together
        return _cut(sorted(sets, key=sorted), self.flying.budget / (2 * size))

    def _run(self, sets: Sequence[Removed], batches: Sequence[int], streams: bool) -> None:
        for visit in walk(sets, self.num_steps):
            needed = streams and bool(visit.through)
            with self._alone(visit.step) as layer, onloaded(layer.modules()) if needed else nullcontext():
                for batch in batches:
                    self._visit(visit, batch)

    @contextmanager
    def _alone(self, step: int) -> Iterator[nn.Module]:
        """Let a step's layer compute nothing but that step."""
        layer, part = divmod(step, self.steps_per_layer)
        lost = {layer: OTHER[PARTS[part]]}
        with nullcontext() if self.stand_ins is None else self.stand_ins.without(lost):
            yield self.layers[layer]

    def _visit(self, visit: Visit, batch: int) -> None:
        step, tokens = visit.step, self.batches[batch]["input_ids"].numel()
        if WHOLE in visit.through and step == 0:
            self._record(batch, 1)
        passed: list[Tensor] = []
        for some in _cut(visit.through, self.tokens_at_once // tokens):
            passed += self._passed(step, some, batch, visit.fronts)
        for removed in visit.around:
            if removed:
                self.flying.rename((removed, batch), (removed | {step}, batch))
            else:
                self.flying[removed | {step}, batch] = self.cached[step, batch]
        for removed, states in zip(visit.through, passed, strict=True):
            if removed:
                self.flying[removed, batch] = states
            else:
                self.cached[step + 1, batch] = states
                if step >= self.removable:
                    del self.cached[step, batch]

    def _passed(
        self, step: int, some: Sequence[Removed], batch: int, fronts: Collection[Removed]
    ) -> tuple[Tensor, ...]:
        """Return several states behind a step; of those in front of removed layers keep what is to be mapped."""
        states = torch.cat([self._entering(removed, step, batch) for removed in some])
        call = self._record(batch, len(some))[step // self.steps_per_layer]
        with ExitStack() as stack:
            seen: list[Tensor] = []
            if self.folds is not None and fronts:
                stack.enter_context(_inputs(self.layers[step], self.folds.path, seen))
            behind = states_out_of(call(states)).chunk(len(some))
        for inputs in seen:
            for removed, each in zip(some, inputs.chunk(len(some)), strict=True):
                if removed in fronts:
                    self.flying["inputs", step, removed, batch] = each
        self.step_forwards, self.layer_calls = self.step_forwards + len(some), self.layer_calls + 1
        return behind

    def _entering(self, removed: Removed, step: int, batch: int) -> Tensor:
        """Return states before a step; behind removed layers, with what is added in their place."""
        states = self._state(removed, step, batch)
        front = next((layer for layer in range(step - 1, -1, -1) if layer not in removed), -1)
        if self.folds is None or front in (step - 1, -1):
            return states
        below = Removed(layer for layer in removed if layer < front)
        if ("inputs", front, below, batch) not in self.flying:  # of the whole model, whose states alone are kept
            self._passed(front, [below], batch, [below])
        inputs = self.flying["inputs", front, below, batch].reshape(*states.shape[:-1], -1)
        return states + inputs @ self.folds.change(front, step).to(states.device, states.dtype).mT

    def _state(self, removed: Removed, step: int, batch: int) -> Tensor:
        return self.flying[removed, batch] if removed else self.cached[step, batch]

    def _record(self, batch: int, times: int) -> list[Call]:
        """Return the decoder's calls of its layers on a batch whose rows are repeated so many times."""
        if (batch, times) not in self._calls:
            while len(self._calls) >= CALLS_KEPT:
                del self._calls[next(iter(self._calls))]
            calls: list[Call] = []
            entering: list[Tensor] = []

            def note(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                entering[:] = entering[:1] or [states_into(args, kwargs)]
                calls.append(_call(layer, args[1:], kwargs, "hidden_states" if not args else None))
                return self._returned(states_into(args, kwargs))

            inputs = model_inputs(self.batches[batch], input_device(self.model))
            with ExitStack() as stack:
                for layer in self.layers:
                    stack.enter_context(answering(layer, partial(note, layer)))
                self.decoder(**{name: each.repeat(times, 1) for name, each in inputs.items()}, use_cache=False)
            self._calls[batch, times] = calls
            if (0, batch) not in self.cached and times == 1:
                self.cached[0, batch] = entering[0]
        return self._calls[batch, times]

    def _returned(self, states: Tensor) -> Any:
        return (states,) if self.returns_tuples else states


@contextmanager
def _inputs(layer: nn.Module, path: str, seen: list[Tensor]) -> Iterator[None]:
    """Gather what flows into a linear of a layer in a block of code."""
    handle = layer.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield
    finally:
        handle.remove()


def _cut(sets: Sequence[Removed], size: float) -> Iterator[Sequence[Removed]]:
    size = max(1, int(min(size, len(sets))))
    return (sets[start : start + size] for start in range(0, len(sets), size))


def _call(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], keyword: str | None) -> Call:
    others = {name: value for name, value in kwargs.items() if name != keyword}  # the states themselves are not kept
    return lambda states: layer(**{keyword: states}, **others) if keyword else layer(states, *args, **others)
