"""The steps of a model that a search may remove, and how a set of them is written: a decoder layer, or half of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from amoeba_plugin.models.kept import PARTS

Granularity = Literal["layer", "sublayer"]
Removed = frozenset[int]  # indices of steps: of layers, or of sublayers, 2 * layer its attention, 2 * layer + 1 its MLP
WHOLE = Removed()


class RunFolds(Protocol):
    """What the layer in front of a run of removed ones adds in their place.

    Attributes:
        path: Of the linear, in a decoder layer, by whose input it tells what to add.
        data: What it was learnt from, by a digest.
    """

    path: str
    data: str

    def prepare(self, sets: Sequence[Removed]) -> None:
        """Learn what some sets of removed layers need; all ranks give the same."""

    def change(self, front: int, end: int) -> Tensor:
        """Return the map, (hidden, inputs), from the linear's input in layer ``front`` to what is added to its states
        where all layers up to ``end`` are gone."""


def steps_per_layer(granularity: Granularity) -> int:
    """Return how many steps a decoder layer is.

    >>> steps_per_layer("layer"), steps_per_layer("sublayer")
    (1, 2)
    """
    return len(PARTS) if granularity == "sublayer" else 1
