"""What a shape computes, in the numbers that its cost is predicted by, whatever the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from amoeba_plugin.elastic.layer_sizes import LayerSizes


@dataclass(frozen=True)
class Work:
    """A shape's sizes, summed over its layers; how much one unit costs, measurements tell.

    >>> Work.of(LayerSizes((0, 2), ({"attention": 2, "mlp": 9}, {"attention": 3, "mlp": 8}), {1: "attention"}))
    Work(sublayers=3, heads=2, neurons=17)

    Attributes:
        sublayers: Attentions and MLPs.
        heads: Units of attention: KV groups.
        neurons: Of MLPs, of all experts.
    """

    sublayers: int
    heads: int
    neurons: int

    @classmethod
    def of(cls, sizes: LayerSizes) -> Work:
        """Count a shape's."""
        kept = [
            {name: count for name, count in units.items() if name != sizes.lost.get(position)}
            for position, units in enumerate(sizes.units)
        ]
        return cls(
            sum(len(units) for units in kept),
            sum(units.get("attention", 0) for units in kept),
            sum(count for units in kept for name, count in units.items() if name != "attention"),
        )

    @property
    def terms(self) -> tuple[float, ...]:
        """What every cost is a sum of multiples of: the one, and the sizes."""
        return (1.0, *map(float, astuple(self)))


def telling(works: Sequence[Work], count: int) -> list[int]:
    """Return which of several shapes tell most about the others when they are measured: a D-optimal design, greedily.

    Args:
        works: Of all shapes, the largest first and the smallest last, which are taken.
        count: How many.

    Returns:
        Indices, ascending.
    """
    rows = np.array([work.terms for work in works])
    rows = rows / np.maximum(np.abs(rows).max(axis=0), 1)
    chosen = sorted({0, len(works) - 1})
    while len(chosen) < min(count, len(works)):
        known = rows[chosen].T @ rows[chosen] + 1e-6 * np.eye(rows.shape[1])
        gain = np.einsum("ij,jk,ik->i", rows, np.linalg.inv(known), rows)  # det grows by 1 + this
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
    return sorted(chosen)
