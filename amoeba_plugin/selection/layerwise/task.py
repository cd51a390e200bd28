"""What a sensitivity is asked, and the dense model that it compares with, run layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from amoeba_plugin.data.batch import Batch, model_inputs
from amoeba_plugin.runtime.module_calls import input_device
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import sum_over_ranks
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.layerwise.compress import Compressor
from amoeba_plugin.selection.layerwise.options import Option
from amoeba_plugin.selection.layerwise.units import Unit

Scores = Mapping[tuple[str, Option], float]
CANDIDATE = -1  # the number by which states of a model with a unit compressed are known


@dataclass
class DenseStates:
    """The states of the dense model before and behind every layer, on this rank's batches; open for a block of code.

    Attributes:
        lockstep: Runs single layers.
    """

    lockstep: Lockstep

    @classmethod
    @contextmanager
    def of(cls, runs: LayerRuns) -> Iterator[DenseStates]:
        """Run the dense model and yield its states; what memory does not hold is in files."""
        with runs.open() as lockstep:
            for layer in range(len(lockstep.layers)):
                lockstep.run_layer(layer)
            yield cls(lockstep)

    @property
    def batches(self) -> Sequence[Batch]:
        """What was run."""
        return self.lockstep.batches

    def before(self, layer: int, batch: int) -> Tensor:
        """Return the states before a layer, (rows, positions, hidden); of their number, those behind the last."""
        return self.lockstep.cached[layer, batch]

    def through(self, first: int, last: int, batch: int) -> Tensor:
        """Return what layers, as they are now, make of the dense states before the first of them.

        Args:
            first: Layer.
            last: Layer, run too.
            batch: Number.
        """
        self.lockstep.flying[CANDIDATE, batch] = self.before(first, batch)
        for layer in range(first, last + 1):
            self.lockstep.pass_on(CANDIDATE, layer, batch)
        found = self.lockstep.flying[CANDIDATE, batch]
        self.lockstep.flying.discard((CANDIDATE, batch))
        return found

    def present(self, batch: int) -> Tensor:
        """Return which tokens are real, (rows, positions)."""
        return self.batches[batch]["attention_mask"].bool()

    def log_probabilities(self, states: Tensor, batch: int) -> Tensor:
        """Return what the head makes of states behind the last layer: (real tokens, vocabulary) fp32."""
        with self.lockstep.emitting(states):
            return self._read(batch)

    def model_log_probabilities(self, batch: int) -> Tensor:
        """Return what the model as it is now says, (real tokens, vocabulary) fp32."""
        return self._read(batch)

    def dense_log_probabilities(self, batch: int) -> Tensor:
        """Return what the dense model says; its layers may be compressed meanwhile."""
        return self.log_probabilities(self.before(len(self.lockstep.layers), batch), batch)

    def _read(self, batch: int) -> Tensor:
        model = self.lockstep.model
        logits: Tensor = model(**model_inputs(self.batches[batch], input_device(model)), use_cache=False).logits
        return functional.log_softmax(logits[self.present(batch).to(logits.device)].float(), dim=-1)


def divergence(dense: Tensor, probabilities: Tensor, other: Tensor) -> float:
    """Return KL(dense || other) summed over tokens, in nats.

    Args:
        dense: Log-probabilities, (tokens, vocabulary) fp32.
        probabilities: Their exponentials, which many others are compared by.
        other: Log-probabilities.
    """
    return float(torch.dot(probabilities.flatten(), (dense - other).flatten()))


@dataclass(frozen=True)
class SensitivityTask:
    """What a sensitivity looks at.

    Attributes:
        dense: The dense model's states.
        batches: All calibration batches, of all ranks.
        units: Of the model.
        options: To be scored, each alone: bits without zeros, and zeros without rounding.
        compressor: Makes weights.
        progress: Whether to show a bar.
    """

    dense: DenseStates
    batches: Sequence[Batch]
    units: Sequence[Unit]
    options: Sequence[Option]
    compressor: Compressor
    progress: bool = field(default=True)

    def by_layer(self, what: str) -> Iterator[tuple[int, list[Unit]]]:
        """Yield every layer with its units, and show how far it is."""
        layers = sorted({unit.layer for unit in self.units})
        for layer in StageBar(layers, desc=what, unit="layer", disable=not self.progress, shorter="less data"):
            yield layer, [unit for unit in self.units if unit.layer == layer]

    def token_count(self) -> float:
        """Return the real tokens of all ranks."""
        mine = sum(float(batch["attention_mask"].sum()) for batch in self.dense.batches)
        return float(sum_over_ranks(torch.tensor(mine, dtype=torch.float64)))


@dataclass(frozen=True)
class Sensitivity:
    """A way to score what every unit loses by every option.

    Attributes:
        name: In recipes.
        measure: Scores by unit and option, 0 or more, whose sums tell better sets of options from worse.
        unit: Of the scores, for people.
        description: In a few words.
    """

    name: str
    measure: Callable[[SensitivityTask], Scores]
    unit: str
    description: str
