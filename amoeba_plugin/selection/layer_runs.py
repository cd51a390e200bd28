"""Calibration batches that go through a model a layer at a time, so that memory holds what one layer needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.sharing import shard
from amoeba_plugin.errors import ArchitectureError, DataError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.runtime.ranks import agreed
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.depth.lockstep_contract import check_contract

GIB = 2**30


@dataclass(frozen=True)
class LayerRuns:
    """Runs batches through the decoder layers of a model, one layer after the other.

    Attributes:
        model: As it is when a run begins, elastic or not; its layers may be changed while they are at hand.
        adapter: Its architecture.
        batches: This rank's.
        returns_tuples: Whether layers return their states as the first of several values.
        cache_gib: GiB of hidden states held in memory; the rest is held in files.
    """

    model: PreTrainedModel
    adapter: ArchitectureAdapter
    batches: Sequence[Batch]
    returns_tuples: bool
    cache_gib: float = 4.0

    @classmethod
    def of(
        cls, model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch], cache_gib: float = 4.0
    ) -> LayerRuns:
        """Return what runs batches; ranks that were given the same share them out.

        Raises:
            ArchitectureError: If the decoder's layers cannot be run one at a time.
            DataError: If there are no tokens.
        """
        if not any(bool(batch["attention_mask"].any()) for batch in batches):
            raise DataError(
                "no token to collect statistics from: the calibration data is empty or all padding; pass texts"
            )
        contract = check_contract(model, adapter, batches)
        if not agreed(contract.broken is None):
            raise ArchitectureError(
                f"layers of a {type(model).__name__} cannot be run one at a time: "
                f"{contract.broken or 'another rank found so'}"
            )
        return cls(model, adapter, shard(batches)[0], contract.returns_tuples, cache_gib)

    @contextmanager
    def open(self) -> Iterator[Lockstep]:
        """Yield what runs the batches through single layers, for a block of code."""
        budget, layers = self.cache_gib * GIB, len(self.adapter.layers(self.model))
        stream = Lockstep.of(self.model, self.adapter, self.batches, layers, budget, returns_tuples=self.returns_tuples)
        with evaluating(self.model), stream as lockstep:
            yield lockstep

    def layers(self) -> Iterator[tuple[int, nn.Module, Callable[..., None]]]:
        """Yield every active layer with its position, and what runs all batches through it.

        What runs them takes a function that is called with the number of every batch before. A layer has to be run once
        at least, whatever is changed of it meanwhile; the states of the last run go on.
        """
        with self.open() as lockstep:
            for position, layer in enumerate(lockstep.layers):
                yield position, layer, partial(lockstep.run_layer, position)
                lockstep.forget([position])
