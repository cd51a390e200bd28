"""Subnets scored one after another, each from its embeddings: for decoders and objectives that allow nothing better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.data.batch import Batch, model_inputs
from amoeba_plugin.models.adapter import ArchitectureAdapter, copy_config
from amoeba_plugin.models.kept import kept_without, removed_names
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.module_calls import input_device
from amoeba_plugin.runtime.peak_memory import peak_memory
from amoeba_plugin.selection.depth.steps import Removed
from amoeba_plugin.selection.objectives import Objective, Score
from amoeba_plugin.selection.over_ranks import joined, of_first_rank, scores_over_ranks
from amoeba_plugin.shape import half_steps


@dataclass
class OneByOne:
    """Runs every subnet from its embeddings, by exchanging the model's list of layers.

    Attributes:
        model: In evaluation mode, without gradients; has some of its layers while a subnet runs.
        adapter: Its architecture.
        batches: What subnets are observed on, or measured on as a whole.
        layers: All its decoder layers.
        config: Its configuration with all of them.
        stand_ins: Of all layers: attention and MLP are steps, 2 * layer and 2 * layer + 1. None: layers are.
        layer_forwards: Decoder layers run so far, counted for each batch; attention or MLP alone is half a layer.
    """

    model: PreTrainedModel
    adapter: ArchitectureAdapter
    batches: Sequence[Batch]
    layers: tuple[nn.Module, ...]
    config: PretrainedConfig
    stand_ins: StandIns | None = None
    layer_forwards: float = 0

    @classmethod
    @contextmanager
    def of(
        cls,
        model: PreTrainedModel,
        adapter: ArchitectureAdapter,
        batches: Sequence[Batch],
        stand_ins: StandIns | None = None,
    ) -> Iterator[OneByOne]:
        """Yield one; layers and configuration are given back with the block."""
        layers, config = tuple(adapter.layers(model)), copy_config(model.config)
        try:
            yield cls(model, adapter, batches, layers, config, stand_ins)
        finally:
            if stand_ins is not None:
                stand_ins.restore()
            adapter.set_layers(model, layers, range(len(layers)), config)

    @contextmanager
    def active(self, removed: Removed) -> Iterator[None]:
        """Run a block without some layers, or sublayers."""
        kept, lost = kept_without(len(self.layers), removed, sublayers=self.stand_ins is not None)
        if self.stand_ins is not None:
            self.stand_ins.set(lost)
        self.adapter.set_layers(self.model, [self.layers[index] for index in kept], kept, self.config)
        self.layer_forwards += half_steps(len(kept) - len(lost) / 2) * len(self.batches)
        yield

    def names(self, removed: Removed) -> list[str]:
        """Return what is removed as people write it: "3", or "3.mlp"."""
        return removed_names(removed, sublayers=self.stand_ins is not None)

    def last_states(self, batch: Batch) -> Tensor:
        """Return what the decoder makes of a batch, (batch, positions, hidden)."""
        inputs = model_inputs(batch, input_device(self.model))
        states: Tensor = self.adapter.decoder(self.model)(**inputs, use_cache=False).last_hidden_state
        return states

    def observe(
        self, objective: Objective, sets: Sequence[Removed], progress: Callable[[], object] = lambda: None
    ) -> list[Tensor]:
        """Return what an objective observes without each of some sets of steps; see ``Runner.observe``."""
        return [self._observed(objective, removed, progress) for removed in sets]

    def measure(self, objective: Objective, sets: Sequence[Removed], progress: Callable[[], object]) -> list[Score]:
        """Return the scores of sets, over all ranks, by any objective; see ``Runner.measure``."""
        if objective.is_separable:
            return scores_over_ranks(objective, self.observe(objective, sets, progress))
        return [self._measured(objective, removed, progress) for removed in sets]

    def report(self) -> dict[str, Any]:
        """Return what was run; see ``Runner.report``."""
        return {"lockstep": False, "layer_forwards": self.layer_forwards, "peak_bytes": peak_memory()}

    def _observed(self, objective: Objective, removed: Removed, progress: Callable[[], object]) -> Tensor:
        rows = []
        with self.active(removed):
            for batch in self.batches:
                rows.append(objective.observe(self.model, batch))
                progress()
        return joined(rows)

    def _measured(self, objective: Objective, removed: Removed, progress: Callable[[], object]) -> Score:
        with self.active(removed):
            score = objective.measure(self.model, self.batches)
        for _ in self.batches:
            progress()
        return of_first_rank(score)
