"""Weights that closed-form repair gives to linears that read channels, by shape: data of a strategy.

Such a linear computes with its first columns where nothing is repaired. Repaired, it has a tensor of its own for every
reduced width, and for depths at which layers behind it are gone; the elastic model takes one by pointer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from torch import Tensor

from amoeba_plugin.shape import ShapeSpace, SubnetShape, parse_depth, parse_width

EVERY = "every"  # in names of tensors: one for all depths that have none of their own
Place = tuple[float | None, Fraction]  # a depth, None for all that have no other tensor, and a width


@dataclass(frozen=True)
class Repairs:
    """The repaired weights of a model's consumers.

    Attributes:
        weights: By place, and by group key: (out, channels kept there), columns in order of importance.
        method: What computed them, by its name; empty where nothing is repaired.
    """

    weights: Mapping[Place, Mapping[str, Tensor]] = field(default_factory=dict)
    method: str = ""

    def __bool__(self) -> bool:
        return bool(self.weights)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.numel() * each.element_size() for held in self.weights.values() for each in held.values())

    def of(self, key: str) -> dict[Place, Tensor]:
        """Return the tensors of one group, by place."""
        return {place: held[key] for place, held in self.weights.items() if key in held}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by the names they are stored under: "24x3/4.5.mlp", "everyx3/4.5.mlp"."""
        return {
            f"{EVERY if depth is None else depth}x{width}.{key}": each.contiguous()
            for (depth, width), held in self.weights.items()
            for key, each in held.items()
        }

    @classmethod
    def stored(cls, tensors: Mapping[str, Tensor], method: str) -> Repairs:
        """Read what :meth:`tensors` named.

        Raises:
            ShapeError: If a name is none.
        """
        weights: dict[Place, dict[str, Tensor]] = {}
        for name, each in tensors.items():
            depth, _, rest = name.partition("x")
            width, _, key = rest.partition(".")
            place = (None if depth == EVERY else parse_depth(depth), parse_width(width))
            weights.setdefault(place, {})[key] = each
        return cls(weights, method)

    def require_space(self, space: ShapeSpace, units: Mapping[str, int]) -> None:
        """Refuse tensors of places that a space has not, of groups that do not exist, or that are not finite.

        Args:
            space: Of the strategy.
            units: Of every group; empty where width is not elastic and nobody knows.

        Raises:
            ValueError: With the tensor.
        """
        for (depth, width), held in self.weights.items():
            if width not in space.widths or not (depth is None or depth in space.depths):
                raise ValueError(f"a weight is repaired for {depth or EVERY}x{width}, which is not in the space")
            for key, each in held.items():
                if (units and key not in units) or each.dim() != 2 or not each.is_floating_point():
                    raise ValueError(f"the repaired weight of {key} is no matrix of a group of the model")
                if not bool(each.isfinite().all()):
                    raise ValueError(f"the repaired weight of {key} is not finite")


def place_of(shape: SubnetShape, places: Mapping[Place, object]) -> Place | None:
    """Return which of some places is a shape's: its own, or that of its width at every depth; None: neither."""
    own: Place = (shape.depth, shape.width)
    every: Place = (None, shape.width)
    return own if own in places else every if every in places else None
