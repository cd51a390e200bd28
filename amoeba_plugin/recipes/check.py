"""The check of a recipe before anything loads: its modifiers, their fields, and what shows when they are together."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from amoeba_plugin.errors import AmoebaError, RecipeError, ShapeError
from amoeba_plugin.recipes.fields import create_modifier
from amoeba_plugin.recipes.files import read_recipe
from amoeba_plugin.recipes.text import SKELETON, Entry, entries_of
from amoeba_plugin.shape import SubnetShape, parse_width

if TYPE_CHECKING:
    from amoeba_plugin.modifiers import DepthShrinkingModifier

ModifierT = TypeVar("ModifierT")


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe whose every key is known and whose every value is in range.

    Attributes:
        source: The file's path, or ``<text>``.
        text: What was checked.
        modifiers: llm-compressor modifiers, in the order in which they run.
    """

    source: str
    text: str
    modifiers: tuple[Any, ...]

    def find(self, kind: type[ModifierT]) -> ModifierT | None:
        """Return the first modifier of a class, or ``None``."""
        return next((modifier for modifier in self.modifiers if isinstance(modifier, kind)), None)

    @property
    def structural(self) -> tuple[Any, ...]:
        """The modifiers of this package."""
        return tuple(modifier for modifier in self.modifiers if _is_ours(modifier))

    @property
    def is_structural(self) -> bool:
        """Whether the recipe holds a modifier of this package."""
        return bool(self.structural)

    @property
    def needs_data(self) -> bool:
        """Whether a modifier wants calibration data."""
        return self.is_structural or any(modifier.requires_calibration_data for modifier in self.modifiers)


def check_recipe(recipe: str | Path) -> CheckedRecipe:
    """Read a recipe and check everything that can be checked without a model.

    Args:
        recipe: Path of a YAML or JSON file, or the text itself (a string with a line break or a colon and a space).

    Returns:
        The recipe with its modifiers made; no session was started, nothing was loaded.

    Raises:
        RecipeError: On the first thing that cannot run, or that llm-compressor would silently ignore.
    """
    source, text = read_recipe(recipe)
    entries = tuple(entries_of(text, source))
    if not entries:
        raise RecipeError(f"{source} holds no modifier; a recipe reads {SKELETON}")
    _require_distinct_groups(entries, source)
    modifiers = tuple(create_modifier(entry, source) for entry in entries)
    checked = CheckedRecipe(source, text, modifiers)
    _check_together(checked)
    return checked


def _require_distinct_groups(entries: tuple[Entry, ...], source: str) -> None:
    stages: dict[str, str] = {}
    for entry in entries:
        if stages.setdefault(entry.group, entry.stage) != entry.stage:
            raise RecipeError(
                f"{source}, line {entry.line}: the group '{entry.group}' is in {stages[entry.group]} and in "
                f"{entry.stage}; the recipe saved beside a checkpoint would lose one of them: give them different names"
            )


def _is_ours(modifier: Any) -> bool:
    return type(modifier).__module__.startswith("amoeba_plugin.")


def _check_together(recipe: CheckedRecipe) -> None:
    """Check what only shows when modifiers are seen together: their order, and a shape that selection does not make."""
    from llmcompressor.recipe import Recipe

    from amoeba_plugin.modifiers.order import require_order

    try:
        require_order(recipe.modifiers)
        Recipe(modifiers=list(recipe.modifiers))
    except AmoebaError as error:
        raise RecipeError(f"{recipe.source}: {error}") from error
    except ValueError as error:
        raise RecipeError(f"{recipe.source}: {str(error).partition('Value error, ')[2] or error}") from error
    _check_shape(recipe)


def _check_shape(recipe: CheckedRecipe) -> None:
    from amoeba_plugin.modifiers import DepthShrinkingModifier, WidthShrinkingModifier

    depth, width = recipe.find(DepthShrinkingModifier), recipe.find(WidthShrinkingModifier)
    if depth is not None and depth.keep_last > depth.min_depth:
        raise RecipeError(
            f"{recipe.source}: keep_last {depth.keep_last} of min_depth {depth.min_depth}: the smallest subnet cannot "
            "keep more last layers than it has layers; lower keep_last or raise min_depth"
        )
    widths = {Fraction(1)} if width is None else {parse_width(each) for each in width.widths}
    for shape in asked_shapes(recipe):
        _require_width_and_depth(recipe.source, shape, widths, depth)


def asked_shapes(recipe: CheckedRecipe) -> list[SubnetShape]:
    """Return the shapes that a recipe names: to extract, and to draw from in training."""
    from amoeba_plugin.modifiers import OneForAllDistillationModifier, SubnetExtractionModifier

    extraction, training = recipe.find(SubnetExtractionModifier), recipe.find(OneForAllDistillationModifier)
    sampled = [] if training is None or isinstance(training.sampled_shapes, str) else training.sampled_shapes
    return [SubnetShape.parse(each) for each in ([] if extraction is None else [extraction.shape]) + sampled]


def _require_width_and_depth(
    source: str, shape: SubnetShape, widths: set[Fraction], depth: DepthShrinkingModifier | None
) -> None:
    if depth is not None and shape.depth < depth.min_depth:
        raise ShapeError(
            f"{source}: shape {shape} is outside the space: its depth is below min_depth {depth.min_depth}; "
            f"take {depth.min_depth} layers or more, or lower min_depth"
        )
    if shape.depth != int(shape.depth) and (
        depth is None or (depth.granularity == "layer" and depth.kept_layers is None)
    ):
        raise ShapeError(
            f"{source}: shape {shape} keeps half a layer, an attention or an MLP alone; set granularity: "
            "sublayer in DepthShrinkingModifier, or take whole layers"
        )
    if shape.width not in widths:
        known = ", ".join(str(each) for each in sorted(widths, reverse=True))
        raise ShapeError(
            f"{source}: shape {shape} is outside the space: the widths are {known}; take one of these, or "
            f'add "{shape.width}" to WidthShrinkingModifier.widths'
        )
