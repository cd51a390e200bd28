"""The configuration that a subnet will have, before its model is loaded: by a recipe, a strategy, or a bare shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy
from amoeba_plugin.elastic.subnet_config import differ, largest_units, per_layer_config
from amoeba_plugin.elastic.subnet_config import subnet_config as elastic_config
from amoeba_plugin.elastic.subnet_plan import SubnetPlan
from amoeba_plugin.errors import RecipeError, ShapeError
from amoeba_plugin.models.adapter import ChannelGroup
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.recipes.check import CheckedRecipe, asked_shapes
from amoeba_plugin.selection.width.allocation import RankedGroup, other_share, rounding_steps, uniform_units
from amoeba_plugin.selection.width.ranking import require_anchors
from amoeba_plugin.shape import SubnetShape, parse_width

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from amoeba_plugin.modifiers import DepthShrinkingModifier, WidthShrinkingModifier

ANY_LOST = {1: "attention"}  # of layers kept in part, whichever these will be: the first stays whole


@dataclass(frozen=True)
class _Expected:
    """What is known of a subnet before its selection has run: which layers it keeps, of which sizes.

    Attributes:
        kept: Indices; of a search that is still to come, the first ones.
        sizes: Of each the units per group.
        lost: By position the sublayer that a layer lacks.
    """

    kept: Sequence[int]
    sizes: list[dict[str, int]]
    lost: Mapping[int, str]


def subnet_config(recipe: CheckedRecipe, config: PretrainedConfig, even_split: bool = False) -> PretrainedConfig:
    """Return the configuration that quantization will see: the subnet's where one is extracted, else the model's.

    Where layers will differ in size (``allocation: global``, ``anchor_layers``), how is often known after selection
    only; this one then has a layer of the least that any may keep, and whole ones.

    Args:
        recipe: Checked.
        config: The model's.
        even_split: Take sizes that are to be measured (``allocation: measured``) for the same share of attention and
            MLP, not for the least that they may be.

    Raises:
        ArchitectureError: If the architecture is not supported, or no class holds the shape.
        RecipeError: If layers named, ``min_depth`` or ``round_to`` do not fit the model.
        ShapeError: If the shape to extract is outside the space.
    """
    from amoeba_plugin.modifiers import DepthShrinkingModifier, SubnetExtractionModifier, WidthShrinkingModifier

    adapter = architecture_for(config.model_type)
    layers = config.num_hidden_layers
    depth, width = recipe.find(DepthShrinkingModifier), recipe.find(WidthShrinkingModifier)
    if depth is not None and depth.min_depth >= layers:
        raise RecipeError(
            f"{recipe.source}: min_depth {depth.min_depth} of a model with {layers} layers leaves nothing to remove; "
            + (f"set min_depth between 1 and {layers - 1}" if layers > 1 else "leave DepthShrinkingModifier out")
        )
    given = None if depth is None or depth.kept_layers is None else DepthStrategy.given(depth.kept_layers, layers)
    groups = adapter.channel_groups(config)
    units = _units_by_width(width, groups, layers)
    for shape in asked_shapes(recipe):
        _require_depth(recipe.source, shape, layers if depth is None else depth.min_depth, layers, given)
    extraction = recipe.find(SubnetExtractionModifier)
    if extraction is None:
        return config
    shape = SubnetShape.parse(extraction.shape)
    whole, smallest = units[Fraction(1)], units[shape.width]
    known = "uniform", *(("measured",) if even_split else ())
    if width is not None and width.allocation not in known and shape.width != 1:
        smallest = rounding_steps(groups, width.round_to)
    expected = _expected(depth, width, given, shape, layers, (smallest, whole))
    biased = frozenset(whole) if width is not None and width.bias_compensation and shape.width != 1 else frozenset()
    if not extraction.portable and (expected.lost or differ(expected.sizes)):
        return per_layer_config(adapter, config, expected.kept, expected.sizes, biased, expected.lost)
    anchored = width is not None and width.anchor_count > 0  # surely whole; other layers only may be
    padded = largest_units(expected.sizes) if anchored or not differ(expected.sizes) else smallest
    return adapter.subnet_config(config, expected.kept, padded, biased)


def sizes_unknown(recipe: CheckedRecipe) -> bool:
    """Tell whether a recipe's selection decides the sizes of what it extracts."""
    from amoeba_plugin.modifiers import SubnetExtractionModifier, WidthShrinkingModifier

    width, extraction = recipe.find(WidthShrinkingModifier), recipe.find(SubnetExtractionModifier)
    if width is None or extraction is None:
        return False
    return width.allocation != "uniform" and SubnetShape.parse(extraction.shape).width != 1


def _units_by_width(
    width: WidthShrinkingModifier | None, groups: Sequence[ChannelGroup], layers: int
) -> dict[Fraction, dict[str, int]]:
    """Return per width the units that layers keep which are no anchors, allocated uniformly."""
    if width is None:
        return {Fraction(1): {group.name: group.units for group in groups}}
    if not isinstance(width.anchor_layers, int):
        require_anchors(width.anchor_layers, layers)
    anchored = Fraction(width.anchor_count, layers)
    return {share: kept_units(groups, share, width.round_to, anchored) for share in map(parse_width, width.widths)}


def _require_depth(source: str, shape: SubnetShape, least: int, layers: int, given: DepthStrategy | None) -> None:
    if not least <= shape.depth <= layers:
        raise ShapeError(
            f"{source}: shape {shape} is outside the space: this model and recipe give depths {least} to {layers}; "
            "take one of these"
        )
    if given is not None and shape.depth not in given.kept:
        raise ShapeError(
            f"{source}: shape {shape} is outside the space: kept_layers has depths "
            f'{", ".join(map(str, sorted(given.kept)))}; take one of these, or add "{shape.depth}" to kept_layers'
        )


def _expected(
    depth: DepthShrinkingModifier | None,
    width: WidthShrinkingModifier | None,
    given: DepthStrategy | None,
    shape: SubnetShape,
    layers: int,
    units: tuple[dict[str, int], dict[str, int]],
) -> _Expected:
    smallest, whole = units
    if given is not None:
        kept: Sequence[int] = given.kept[shape.depth]
        gone = given.lost.get(shape.depth, {})
        lost: Mapping[int, str] = {position: gone[index] for position, index in enumerate(kept) if index in gone}
    elif depth is not None and depth.granularity == "sublayer" and shape.depth < layers:
        kept, lost = range(min(math.floor(shape.depth) + 1, layers)), ANY_LOST
    else:
        kept, lost = range(math.ceil(shape.depth)), {}
    if width is None or shape.width == 1 or (width.allocation != "global" and not width.anchor_count):
        return _Expected(kept, [smallest] * len(kept), lost)
    searched = depth is not None and given is None and shape.depth < layers
    if width.allocation != "uniform" or isinstance(width.anchor_layers, int) or searched:
        return _Expected(kept, [smallest, *[whole] * (len(kept) - 1)], lost)
    anchors = width.anchor_layers
    return _Expected(kept, [whole if index in anchors else smallest for index in kept], lost)


def planned_config(
    config: PretrainedConfig, shape: SubnetShape, directory: Path, portable: bool = False
) -> PretrainedConfig:
    """Return the configuration of a shape of a strategy that is there already; no weights are needed.

    Args:
        config: The whole model's.
        shape: Of the strategy's space.
        directory: Holds ``strategy.json``; an elastic checkpoint does.
        portable: Pad layers of different sizes to the largest, for a stock class.

    Raises:
        ArtifactError: If there is no strategy, or it belongs to a model of other sizes.
        ArchitectureError: If the architecture is not supported, or no class holds the shape.
        ShapeError: If the strategy's space does not hold the shape.
    """
    plan = SubnetPlan(architecture_for(config.model_type), config, SubnetStrategy.load(directory))
    plan.require_fit(str(directory))
    return elastic_config(plan, plan.space.require(shape), portable)


def shape_config(config: PretrainedConfig, shape: SubnetShape, round_to: int = 1) -> PretrainedConfig:
    """Return the configuration of a shape of a model, allocated uniformly, whatever layers it will keep.

    A whole number of layers is taken for whole layers, a half for layers of which some lack attention or MLP.

    Raises:
        ArchitectureError: If the architecture is not supported, or no stock class holds the shape.
        ShapeError: If the model has fewer layers.
        RecipeError: If ``round_to`` does not fit the model, or leaves nothing.
    """
    adapter = architecture_for(config.model_type)
    if shape.depth > config.num_hidden_layers:
        raise ShapeError(f"shape {shape} has more layers than the model, which has {config.num_hidden_layers}")
    units = kept_units(adapter.channel_groups(config), shape.width, round_to)
    if shape.depth != int(shape.depth):
        kept = range(math.ceil(shape.depth))
        return per_layer_config(adapter, config, kept, [units] * len(kept), frozenset(), ANY_LOST)
    return adapter.subnet_config(config, range(int(shape.depth)), units)


def kept_units(
    groups: Sequence[ChannelGroup], width: Fraction, round_to: int | dict[str, int], anchored: Fraction = Fraction(0)
) -> dict[str, int]:
    """Return how many units of each group a width keeps with uniform allocation, by the same arithmetic as selection.

    Where a share of the layers is ``anchored``, this is what all others keep.

    Raises:
        RecipeError: If ``round_to`` names a group that does not exist, does not fit its units, or leaves nothing.
    """
    unscored = [RankedGroup(group.name, group, torch.empty(0), 0) for group in groups]
    return uniform_units(unscored, other_share(width, anchored), rounding_steps(groups, round_to))
