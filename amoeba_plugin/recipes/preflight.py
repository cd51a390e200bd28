"""What can be refused before a model loads: recipe against configuration, and where results are to be written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amoeba_plugin.deployment.expert_schemes import require_readable
from amoeba_plugin.elastic.subnet_config import weightless
from amoeba_plugin.errors import ArchitectureError, ArtifactError, RecipeError
from amoeba_plugin.models.adapter import require_alike_layers
from amoeba_plugin.models.expert_linears import take_apart
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.recipes.check import CheckedRecipe
from amoeba_plugin.recipes.model_plan import sizes_unknown, subnet_config
from amoeba_plugin.runtime.files import is_vacant, require_writable

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from transformers import PretrainedConfig, PreTrainedModel


def require_new_directory(directory: Path, replaceable: str | None = None) -> None:
    """Refuse to write results over anything.

    Args:
        directory: Must not exist, or be empty.
        replaceable: Name of a JSON file whose presence, with a ``format`` of this package, marks older results.

    Raises:
        ArtifactError: If it is a file, holds something else, or cannot be written.
    """
    if is_vacant(directory) or (replaceable is not None and _is_ours(directory / replaceable)):
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
    from amoeba_plugin.elastic.checkpoint import require_replaceable
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
        recipe: From :func:`amoeba_plugin.recipes.check.check_recipe`.
        config: The model's; weights are not needed.

    Raises:
        ArchitectureError: If the architecture is not supported, the model quantized, no stock class holds the shape, or
            SmoothQuant or AWQ would change what the model computes.
        RecipeError: If layers or linears named, ``min_depth``, ``round_to`` or a group size do not fit the model.
        ShapeError: If the shape to extract is outside the space.
    """
    require_alike_layers(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ArchitectureError(
            "the model is already quantized (config.quantization_config), and everything here works on full-precision "
            "weights; give the original model"
        )
    whole = config
    if recipe.is_structural:
        config = subnet_config(recipe, config)
    _check_targets(recipe, whole)
    quantizing = [
        (type(modifier).__name__, modifier.resolve_quantization_config())
        for modifier in recipe.modifiers
        if hasattr(modifier, "resolve_quantization_config")
    ]
    if quantizing:
        _check_quantization(recipe, quantizing, config)
    _check_smoothing(recipe, [each for _, each in quantizing], config, whole)


def _check_targets(recipe: CheckedRecipe, config: PretrainedConfig) -> None:
    """Refuse names that no linear has: PEFT passes over them where others fit, and complains after selection else."""
    from amoeba_plugin.modifiers import OneForAllDistillationModifier

    training = recipe.find(OneForAllDistillationModifier)
    if training is None or training.adapter == "none" or training.adapter.target_modules is None:
        return
    linears = [path for path, module in weightless(config).named_modules() if isinstance(module, torch.nn.Linear)]
    unknown = [
        name for name in training.adapter.target_modules if not any(f".{path}".endswith(f".{name}") for path in linears)
    ]
    if unknown:
        possible = dict.fromkeys(path.rpartition(".")[2] for path in linears)
        raise RecipeError(
            f"{recipe.source}: adapter.target_modules names {', '.join(unknown)}, and the model has no such linear; "
            f"possible are {', '.join(possible)}"
        )


def has_experts(config: PretrainedConfig) -> bool:
    """Tell whether a model has experts that its architecture's adapter knows of; False where there is no adapter."""
    try:
        groups = architecture_for(config.model_type).channel_groups(config)
    except ArchitectureError:
        return False
    return any(group.consumer.expert is not None for group in groups)


def _check_quantization(
    recipe: CheckedRecipe, quantizing: list[tuple[str, QuantizationConfig]], config: PretrainedConfig
) -> None:
    model = weightless(config)
    if has_experts(config):
        adapter = architecture_for(config.model_type)
        require_readable([config for _, config in quantizing], take_apart(model, adapter), recipe.source)
    for name, quantization in quantizing:
        for scheme in quantization.config_groups.values():
            size = _group_size(scheme)
            if size:
                _require_divisible(recipe, name, scheme, quantization.ignore or [], size, model)


def _check_smoothing(
    recipe: CheckedRecipe, quantizing: list[QuantizationConfig], config: PretrainedConfig, whole: PretrainedConfig
) -> None:
    from amoeba_plugin.modifiers.smoothing import require_outputs_kept

    try:
        adapter = architecture_for(whole.model_type)
    except ArchitectureError:  # nothing here knows how to make such a model small; the recipe only quantizes it
        return
    require_outputs_kept(recipe.modifiers, quantizing, config, adapter, recipe.source)


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
        any_of = "any multiple of " if sizes_unknown(recipe) else ""
        where = ", ".join(f"{linear} ({any_of}{columns} inputs)" for linear, columns in odd.items())
        common = max(each for each in _divisors(size) if all(columns % each == 0 for columns in odd.values()))
        smaller = f"or group_size to {common} (in config_groups), " if common > 1 else ""
        raise RecipeError(
            f"{recipe.source}: {name} quantizes in groups of {size} input channels, which do not divide {where}; set "
            f"WidthShrinkingModifier.round_to to a multiple of {size}, {smaller}or a scheme without groups (W8A8), or "
            "add these modules to ignore"
        )


def _divisors(number: int) -> Iterator[int]:
    return (each for each in range(1, number + 1) if number % each == 0)


def _is_ours(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and str(document.get("format", "")).startswith("amoeba_plugin.")
