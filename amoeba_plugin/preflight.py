"""What can be refused before a model loads: recipe against configuration, and where results are to be written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amoeba_plugin.architecture import ChannelGroup
from amoeba_plugin.directories import require_writable
from amoeba_plugin.errors import ArchitectureError, ArtifactError, RecipeError, ShapeError
from amoeba_plugin.plugins import architecture_for
from amoeba_plugin.recipes import CheckedRecipe, asked_shapes
from amoeba_plugin.shape import SubnetShape, parse_width
from amoeba_plugin.strategy import DepthStrategy, SubnetStrategy
from amoeba_plugin.subnet_classes import build, per_layer_config
from amoeba_plugin.subnet_classes import subnet_config as elastic_config
from amoeba_plugin.subnet_plan import SubnetPlan

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import PretrainedConfig, PreTrainedModel

    from amoeba_plugin.modifiers import DepthShrinkingModifier


ANY_LOST = {1: "attention"}  # of layers kept in part, whichever these will be: the first stays whole


def require_new_directory(directory: Path, replaceable: str | None = None) -> None:
    """Refuse to write results over anything.

    Args:
        directory: Must not exist, or be empty.
        replaceable: Name of a JSON file whose presence, with a ``format`` of this package, marks older results.

    Raises:
        ArtifactError: If it is a file, holds something else, or cannot be written.
    """
    empty = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    if empty or (replaceable is not None and _is_ours(directory / replaceable)):
        require_writable(directory, whole=replaceable is None)
        return
    raise ArtifactError(
        f"{directory} exists and holds something else, and nothing is overwritten; "
        "name another --output-dir, or empty this one"
    )


def require_elastic_dir(recipe: CheckedRecipe, output_dir: Path) -> None:
    """Refuse a recipe whose elastic checkpoint has nowhere to go, or that writes into the output directory.

    Raises:
        ArtifactError: If ``elastic_dir`` holds something else, or a directory that the recipe names cannot be written.
        RecipeError: If a directory that the recipe names is the output directory or in it, or the elastic checkpoint
            would hold the output directory: these two are written whole or not at all.
    """
    from amoeba_plugin.checkpoint import require_replaceable
    from amoeba_plugin.modifiers import DepthShrinkingModifier, OneForAllDistillationModifier

    depth, training = recipe.find(DepthShrinkingModifier), recipe.find(OneForAllDistillationModifier)
    named = {
        "resume_dir": None if depth is None else depth.resume_dir,
        "checkpoint_dir": None if training is None else training.checkpoint_dir,
        "elastic_dir": None if training is None else training.elastic_dir,
    }
    output = output_dir.resolve()
    for field, name in named.items():
        directory = Path(name or "").resolve()
        around = field == "elastic_dir" and directory in output.parents
        if name is not None and (around or output in (directory, *directory.parents)):
            raise RecipeError(
                f"{field} {name} and the output directory {output_dir} are the same, or one is in the other, and the "
                "checkpoint in it is to be there whole or not at all; name two directories side by side"
            )
        if name is not None:
            require_writable(Path(name), whole=field == "elastic_dir")
    if named["elastic_dir"] is not None:
        require_replaceable(Path(named["elastic_dir"]))


def check_against_model(recipe: CheckedRecipe, config: PretrainedConfig) -> None:
    """Check a recipe against the sizes of the model it is meant for.

    Args:
        recipe: From :func:`amoeba_plugin.recipes.check_recipe`.
        config: The model's; weights are not needed.

    Raises:
        ArchitectureError: If the architecture is not supported, the model quantized, or no stock class holds the shape.
        RecipeError: If layers named, ``min_depth``, ``round_to`` or a group size do not fit the model.
        ShapeError: If the shape to extract is outside the space.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ArchitectureError(
            "the model is already quantized (config.quantization_config), and everything here works on full-precision "
            "weights; give the original model"
        )
    if recipe.is_structural:
        config = subnet_config(recipe, config)
    _check_quantization(recipe, config)


def subnet_config(recipe: CheckedRecipe, config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration that quantization will see: the subnet's where one is extracted, else the model's.

    Where layers will differ in size (``allocation: global``, ``anchor_layers``), how is known after selection only;
    this one has a layer of the least that any may keep, and whole ones.
    """
    from amoeba_plugin.allocation import rounding_steps
    from amoeba_plugin.modifiers import DepthShrinkingModifier, SubnetExtractionModifier, WidthShrinkingModifier
    from amoeba_plugin.width import require_anchors

    adapter = architecture_for(config.model_type)
    layers = config.num_hidden_layers
    depth, width = recipe.find(DepthShrinkingModifier), recipe.find(WidthShrinkingModifier)
    if depth is not None and depth.min_depth >= layers:
        raise RecipeError(
            f"{recipe.source}: min_depth {depth.min_depth} of a model with {layers} layers leaves nothing to remove; "
            f"set min_depth between 1 and {layers - 1}"
        )
    given = None if depth is None or depth.kept_layers is None else DepthStrategy.given(depth.kept_layers, layers)
    groups = adapter.channel_groups(config)
    units = {Fraction(1): {group.name: group.units for group in groups}}
    if width is not None:
        if not isinstance(width.anchor_layers, int):
            require_anchors(width.anchor_layers, layers)
        anchored = Fraction(width.anchor_count, layers)
        units = {share: kept_units(groups, share, width.round_to, anchored) for share in map(parse_width, width.widths)}
    for shape in asked_shapes(recipe):
        _require_depth(recipe.source, shape, layers if depth is None else depth.min_depth, layers, given)
    extraction = recipe.find(SubnetExtractionModifier)
    if extraction is None:
        return config
    shape = SubnetShape.parse(extraction.shape)
    whole, smallest = units[Fraction(1)], units[shape.width]
    uneven = width is not None and shape.width != 1 and (width.allocation == "global" or width.anchor_count > 0)
    if width is not None and width.allocation != "uniform" and shape.width != 1:  # sizes are not known yet
        smallest = rounding_steps(groups, width.round_to)
    in_part = not extraction.portable and _in_part(depth, given, shape, layers)
    kept = range(min(math.floor(shape.depth) + 1, layers) if in_part else math.ceil(shape.depth))
    biased = frozenset(smallest) if width is not None and width.bias_compensation and shape.width != 1 else frozenset()
    if in_part or (uneven and not extraction.portable and len(kept) > 1):
        sizes = [smallest, *[whole if uneven else smallest] * (len(kept) - 1)]
        return per_layer_config(adapter, config, kept, sizes, biased, ANY_LOST if in_part else {})
    return adapter.subnet_config(config, kept, smallest, biased)


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


def _in_part(
    depth: DepthShrinkingModifier | None, given: DepthStrategy | None, shape: SubnetShape, layers: int
) -> bool:
    """Tell whether a shape keeps layers in part; where that is still to be searched, whether it may."""
    if given is not None:
        return shape.depth in given.lost
    return depth is not None and depth.granularity == "sublayer" and shape.depth < layers


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
    from amoeba_plugin.allocation import RankedGroup, other_share, rounding_steps, uniform_units

    unscored = [RankedGroup(group.name, group, torch.empty(0), 0) for group in groups]
    return uniform_units(unscored, other_share(width, anchored), rounding_steps(groups, round_to))


def has_experts(config: PretrainedConfig) -> bool:
    """Tell whether a model has experts that its architecture's adapter knows of; False where there is no adapter."""
    try:
        groups = architecture_for(config.model_type).channel_groups(config)
    except ArchitectureError:
        return False
    return any(group.consumer.expert is not None for group in groups)


def _check_quantization(recipe: CheckedRecipe, config: PretrainedConfig) -> None:
    quantizing = [
        (type(modifier).__name__, modifier.resolve_quantization_config())
        for modifier in recipe.modifiers
        if hasattr(modifier, "resolve_quantization_config")
    ]
    if not quantizing:
        return
    model = weightless(config)
    if has_experts(config):
        from amoeba_plugin.modifiers.quantized_experts import require_readable, take_apart

        require_readable([config for _, config in quantizing], take_apart(model), recipe.source)
    for name, quantization in quantizing:
        for scheme in quantization.config_groups.values():
            size = _group_size(scheme)
            if size:
                _require_divisible(recipe, name, scheme, quantization.ignore, size, model)


def _group_size(scheme: QuantizationScheme) -> int | None:
    weights = scheme.weights
    if weights is None or weights.group_size is None or weights.group_size < 1:
        return None
    return int(weights.group_size)


def _require_divisible(
    recipe: CheckedRecipe, name: str, scheme: Any, ignore: list[str], size: int, model: PreTrainedModel
) -> None:
    from compressed_tensors.utils import match_named_modules

    odd: dict[str, int] = {}  # inputs by the linear's name, which is the same in every layer
    for path, module in match_named_modules(model, scheme.targets, ignore):
        columns = getattr(module, "in_features", size)
        if columns % size:
            odd[path.rpartition(".")[2]] = columns
    if odd:
        where = ", ".join(f"{linear} ({columns} inputs)" for linear, columns in odd.items())
        common = max(each for each in _divisors(size) if all(columns % each == 0 for columns in odd.values()))
        raise RecipeError(
            f"{recipe.source}: {name} quantizes in groups of {size} input channels, which do not divide {where}; set "
            f"WidthShrinkingModifier.round_to to a multiple of {size}, or group_size to {common} (in config_groups), "
            "or a scheme without groups (W8A8), or add these modules to ignore"
        )


def _divisors(number: int) -> Iterator[int]:
    return (each for each in range(1, number + 1) if number % each == 0)


def weightless(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of a configuration without weights."""
    with torch.device("meta"):
        return build(config)


def _is_ours(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and str(document.get("format", "")).startswith("amoeba_plugin.")
