"""What a recipe tells of its subnets before its selection has run: which shapes there will be, and of which sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from amoeba_plugin.elastic.layer_sizes import LOST_SOMEWHERE, LayerSizes
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import RecipeError, ShapeError
from amoeba_plugin.models.adapter import ChannelGroup
from amoeba_plugin.modifiers import DepthShrinkingModifier, WidthShrinkingModifier
from amoeba_plugin.selection.width.allocation import kept_units, rounding_steps
from amoeba_plugin.selection.width.ranking import require_anchors
from amoeba_plugin.shape import SubnetShape, parse_width


@dataclass(frozen=True)
class ExpectedDepths:
    """What a recipe makes of a model's layers.

    Attributes:
        modifier: Of the recipe; ``None``: every subnet keeps all layers.
        num_layers: Of the whole model.
        given: The layers that the recipe names itself.
    """

    modifier: DepthShrinkingModifier | None
    num_layers: int
    given: DepthStrategy | None = None

    @classmethod
    def of(cls, modifier: DepthShrinkingModifier | None, num_layers: int) -> ExpectedDepths:
        """Read what a recipe says of depth.

        Raises:
            RecipeError: If ``min_depth`` or the layers given do not fit the model.
        """
        if modifier is None:
            return cls(None, num_layers)
        if modifier.least_depth(num_layers) >= num_layers:
            advice = f"set min_depth between 1 and {num_layers - 1}" if num_layers > 1 else "leave the modifier out"
            raise RecipeError(
                f"min_depth {modifier.min_depth} of a model with {num_layers} layers leaves nothing to remove; {advice}"
            )
        beyond = [depth for depth in modifier.depths or () if depth > num_layers]
        if beyond:
            raise RecipeError(f"depths {beyond} are impossible: the model has {num_layers} layers")
        kept = modifier.kept_layers
        return cls(modifier, num_layers, None if kept is None else DepthStrategy.given(kept, num_layers))

    def require(self, shape: SubnetShape) -> None:
        """Refuse a shape whose depth no subnet of the model will have.

        Raises:
            ShapeError: With the depths there will be.
        """
        least = self.num_layers if self.modifier is None else self.modifier.least_depth(self.num_layers)
        if not least <= shape.depth <= self.num_layers:
            raise ShapeError(
                f"shape {shape} is outside the space: this model and recipe give depths {least} to {self.num_layers}; "
                "take one of these"
            )
        depths = None if self.modifier is None else self.modifier.depths
        if depths is not None and shape.depth not in (*depths, self.num_layers):
            raise ShapeError(
                f"shape {shape} is outside the space: the recipe has depths "
                f"{', '.join(map(str, sorted(depths)))}; take one of these, or add {shape.depth} to them"
            )
        if self.given is not None and shape.depth not in self.given.kept:
            raise ShapeError(
                f"shape {shape} is outside the space: kept_layers has depths "
                f'{", ".join(map(str, sorted(self.given.kept)))}; take one of these, or add "{shape.depth}" to '
                "kept_layers"
            )

    def layers(self, depth: float) -> tuple[Sequence[int], Mapping[int, str]]:
        """Return the layers that a depth keeps, of a search that is still to come the first ones; and by position what
        they lack."""
        if self.given is not None:
            kept, gone = self.given.kept[depth], self.given.lost.get(depth, {})
            return kept, {position: gone[index] for position, index in enumerate(kept) if index in gone}
        if self.searched(depth) and self.modifier is not None and self.modifier.granularity == "sublayer":
            return range(min(math.floor(depth) + 1, self.num_layers)), LOST_SOMEWHERE
        return range(math.ceil(depth)), {}

    def searched(self, depth: float) -> bool:
        """Tell whether the layers that a depth keeps are known after a search only."""
        return self.modifier is not None and self.given is None and depth < self.num_layers


@dataclass(frozen=True)
class ExpectedWidths:
    """What a recipe makes of a model's channels.

    Attributes:
        modifier: Of the recipe; ``None``: every subnet keeps all channels.
        groups: Of one layer.
        units: Per width the units per group that layers keep which are no anchors, allocated uniformly.
    """

    modifier: WidthShrinkingModifier | None
    groups: Sequence[ChannelGroup]
    units: Mapping[Fraction, Mapping[str, int]]

    @classmethod
    def of(
        cls, modifier: WidthShrinkingModifier | None, groups: Sequence[ChannelGroup], num_layers: int
    ) -> ExpectedWidths:
        """Read what a recipe says of width.

        Raises:
            RecipeError: If anchors or ``round_to`` do not fit the model, or a width leaves nothing.
        """
        if modifier is None:
            return cls(None, groups, {Fraction(1): {group.name: group.units for group in groups}})
        if not isinstance(modifier.anchor_layers, int):
            require_anchors(modifier.anchor_layers, num_layers)
        anchored = Fraction(modifier.anchor_count, num_layers)
        shares = map(parse_width, modifier.widths)
        units = {share: kept_units(groups, share, modifier.round_to, anchored) for share in shares}
        return cls(modifier, groups, units)

    @property
    def whole(self) -> Mapping[str, int]:
        """Units per group of a layer that keeps all."""
        return self.units[Fraction(1)]

    @property
    def least_of_all(self) -> Mapping[str, int]:
        """The least units per group that a layer may keep at any width."""
        return self.whole if self.modifier is None else rounding_steps(self.groups, self.modifier.round_to)

    def least(self, width: Fraction) -> Mapping[str, int]:
        """Return the least units per group that a layer may keep at a width."""
        if self.modifier is None or width == 1 or self.modifier.allocation == "uniform":
            return self.units[width]
        return self.least_of_all

    def layers(self, kept: Sequence[int], width: Fraction, searched: bool) -> list[Mapping[str, int]]:
        """Return the units of every layer kept; where the selection decides, one layer of the least, and whole ones.

        Args:
            kept: Indices of the layers.
            width: A width of the recipe.
            searched: Whether other layers may be kept in the end.
        """
        modifier, least = self.modifier, self.least(width)
        if modifier is None or width == 1 or (modifier.allocation != "global" and not modifier.anchor_count):
            return [least] * len(kept)
        anchors = modifier.anchor_layers
        if modifier.allocation == "global" or isinstance(anchors, int) or searched:
            return [least, *[self.whole] * (len(kept) - 1)]
        return [self.whole if index in anchors else least for index in kept]

    def biased(self, width: Fraction) -> frozenset[str]:
        """Return the groups whose consumer gets an output bias."""
        compensated = self.modifier is not None and self.modifier.bias_compensation and width != 1
        return frozenset(self.whole) if compensated else frozenset()


def expected_sizes(depths: ExpectedDepths, widths: ExpectedWidths, shape: SubnetShape, portable: bool) -> LayerSizes:
    """Return the sizes of a subnet as far as they are known: what a quantization must be able to take.

    Args:
        depths: Which hold the shape.
        widths: Which hold the shape.
        shape: Of the subnet.
        portable: Whether layers are padded to a stock class: to the least that all may keep where none is known to keep
            more.
    """
    kept, lost = depths.layers(shape.depth)
    units = widths.layers(kept, shape.width, depths.searched(shape.depth))
    sizes = LayerSizes(kept, units, lost, widths.biased(shape.width))
    if not portable:
        return sizes
    anchored = widths.modifier is not None and widths.modifier.anchor_count > 0  # surely whole; others only may be
    return sizes.padded if anchored else LayerSizes(kept, [widths.least(shape.width)] * len(kept), {}, sizes.biased)
