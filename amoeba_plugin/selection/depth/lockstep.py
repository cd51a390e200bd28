"""Many subnets of one model observed at once: what they have in common is computed once, layer by layer.

Where attention and MLP may go apart, each is a step of its own: the layer in which a stand-in takes the other's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from amoeba_plugin.selection.depth.steps import WHOLE, Removed
from amoeba_plugin.selection.hidden_states import states_into, states_out_of
from amoeba_plugin.selection.objectives import Objective, Score
from amoeba_plugin.selection.over_ranks import joined, scores_over_ranks
from amoeba_plugin.shape import half_steps

Call = Callable[[Tensor], Any]  # a decoder layer with all its arguments but the states
TOKENS_AT_ONCE = 2**13  # beyond, one call of a layer is not faster than two
CALLS_KEPT = 8  # recorded arguments hold a mask of (rows, 1, positions, positions) where there is padding


@dataclass(frozen=True)
class Visit:
    """What happens at one step, a layer or a sublayer: which states go through it, and which are led around it.

    A state is known by the steps removed before it; the empty set is the whole model's.
    """

    step: int
    through: tuple[Removed, ...]
    around: tuple[Removed, ...]


def walk(sets: Sequence[Removed], num_steps: int) -> Iterator[Visit]:
    """Yield the steps at which subnets need states, first to last.

    Sets with the same steps removed so far share one state. As long as none is removed it is the whole model's, which
    is run only where the whole model is among the sets.

    >>> [len(visit.through) for visit in walk([frozenset({1}), frozenset({1, 3}), frozenset({2})], 5)]
    [0, 1, 2, 3]
    """
    for step in range(min(min(removed, default=0) for removed in sets), num_steps):
        so_far = {removed: Removed(index for index in removed if index < step) for removed in sets}
        known = set() if WHOLE in sets else {WHOLE}
        through = dict.fromkeys(so_far[removed] for removed in sets if step not in removed)
        around = dict.fromkeys(so_far[removed] for removed in sets if step in removed)
        yield Visit(step, tuple(state for state in through if state not in known), tuple(around))


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
        with self.emitting(self._state(removed, self.num_steps, batch)):
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
            states = torch.cat([self._state(removed, step, batch) for removed in some])
            output = self._record(batch, len(some))[step // self.steps_per_layer](states)
            passed += states_out_of(output).chunk(len(some))
            self.step_forwards, self.layer_calls = self.step_forwards + len(some), self.layer_calls + 1
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


def _cut(sets: Sequence[Removed], size: float) -> Iterator[Sequence[Removed]]:
    size = max(1, int(min(size, len(sets))))
    return (sets[start : start + size] for start in range(0, len(sets), size))


def _call(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], keyword: str | None) -> Call:
    others = {name: value for name, value in kwargs.items() if name != keyword}  # the states themselves are not kept
    return lambda states: layer(**{keyword: states}, **others) if keyword else layer(states, *args, **others)
