"""The sizes of a subnet's layers: computed once, and handed on to whoever configures, cuts, audits or describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

LOST_SOMEWHERE = {1: "attention"}  # by position, of layers kept in part, whichever these will be: the first stays whole


@dataclass(frozen=True)
class LayerSizes:
    """What every layer of a subnet keeps.

    >>> sizes = LayerSizes((0, 2), ({"attention": 2, "mlp": 9}, {"attention": 3, "mlp": 8}))
    >>> sizes.alike, sizes.largest, sizes.padded.alike
    (False, {'attention': 3, 'mlp': 9}, True)

    Attributes:
        kept: Indices, in the whole model, of the layers of which anything is kept, ascending.
        units: Of each the units per group name.
        lost: By position among those kept the sublayer that a layer lacks, "attention" or "mlp".
        biased: Names of groups whose consumer carries an output bias that the model did not have.
    """

    kept: Sequence[int]
    units: Sequence[Mapping[str, int]]
    lost: Mapping[int, str] = field(default_factory=dict)
    biased: frozenset[str] = frozenset()

    @property
    def even(self) -> bool:
        """Whether all layers keep the same units."""
        return all(units == self.units[0] for units in self.units)

    @property
    def alike(self) -> bool:
        """Whether a stock class can hold the layers: all keep the same units, and none lacks a sublayer."""
        return self.even and not self.lost

    @property
    def largest(self) -> dict[str, int]:
        """Per group name the most units that a layer keeps."""
        return {name: max(units[name] for units in self.units) for name in self.units[0]}

    @property
    def padded(self) -> LayerSizes:
        """The sizes of a stock class that holds the layers padded with zeros: all as the largest, and whole."""
        return replace(self, units=[self.largest] * len(self.units), lost={})
