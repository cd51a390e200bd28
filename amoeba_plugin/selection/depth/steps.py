"""The steps of a model that a search may remove, and how a set of them is written: a decoder layer, or half of one."""

from __future__ import annotations

from typing import Literal

from amoeba_plugin.models.kept import PARTS

Granularity = Literal["layer", "sublayer"]
Removed = frozenset[int]  # indices of steps: of layers, or of sublayers, 2 * layer its attention, 2 * layer + 1 its MLP
WHOLE = Removed()


def steps_per_layer(granularity: Granularity) -> int:
    """Return how many steps a decoder layer is.

    >>> steps_per_layer("layer"), steps_per_layer("sublayer")
    (1, 2)
    """
    return len(PARTS) if granularity == "sublayer" else 1
