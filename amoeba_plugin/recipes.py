"""The check of a recipe before anything loads: its modifiers, their fields, and what shows when they are together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, get_args

from amoeba_plugin.errors import AmoebaError, RecipeError, ShapeError
from amoeba_plugin.recipe_files import did_you_mean, read_recipe
from amoeba_plugin.recipe_text import GROUP_SUFFIX, SKELETON, Entry, entries_of
from amoeba_plugin.shape import SubnetShape, parse_width

# Fields every llm-compressor modifier has and none acts on: a modifier with `start: 1` never starts.
DEAD_FIELDS = ("start", "end", "update", "index")

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
    modifiers = tuple(_create(entry, source) for entry in entries)
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


def _create(entry: Entry, source: str) -> Any:
    where = f"{source}, line {entry.line}: {entry.name}"
    kind = _known_modifiers().get(entry.name)
    if kind is None:
        names = _known_modifiers()
        raise RecipeError(
            f"{source}, line {entry.line}: there is no modifier '{entry.name}'.{did_you_mean(entry.name, names)} "
            f"Known: {', '.join(sorted(names))}"
        )
    if "group" in entry.fields:
        raise RecipeError(
            f"{where}: 'group' is no field; a modifier's group is the key it stands under ('{entry.group}')"
        )
    dead = [name for name in DEAD_FIELDS if entry.fields.get(name) is not None]
    if dead and kind.__module__.startswith(f"{__package__}."):
        raise RecipeError(
            f"{where}: '{dead[0]}' has no effect, modifiers run once, in the order of the recipe; remove it"
        )
    _require_known_fields(kind, entry.fields, where)
    return _instantiate(kind, entry, where)


def _instantiate(kind: type[Any], entry: Entry, where: str) -> Any:
    from pydantic import ValidationError

    try:
        return kind(group=entry.group.removesuffix(GROUP_SUFFIX), **entry.fields)
    except ValidationError as error:
        problems = "; ".join(_problem(each) for each in error.errors(include_url=False))
        raise RecipeError(f"{where}: {problems}") from error
    except (AmoebaError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _problem(error: Mapping[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{field} must be given"
    if error["type"] == "extra_forbidden":
        return f"'{field}' is no field"
    if error["type"] == "value_error" or not field:
        return message if field in message else f"{field}: {message}"
    return f"{field}: {error['input']!r} is not possible ({message[0].lower()}{message[1:]})"


def _require_known_fields(kind: type[Any], fields: Mapping[str, Any], where: str) -> None:
    from pydantic import BaseModel

    known = {name: info for name, info in kind.model_fields.items() if name != "group" and not name.endswith("_")}
    for name, value in fields.items():
        if name not in known:
            raise RecipeError(
                f"{where}: '{name}' is no field.{did_you_mean(name, known)} "
                f"Fields: {', '.join(_own_first(kind, known))}"
            )
        choices = get_args(known[name].annotation) or (known[name].annotation,)  # the parts of a union
        models = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
        if isinstance(value, Mapping) and len(models) == 1:
            _require_known_fields(models[0], value, f"{where}.{name}")


def _own_first(kind: type[Any], known: Mapping[str, Any]) -> list[str]:
    inherited = set(kind.__mro__[1].model_fields) if hasattr(kind.__mro__[1], "model_fields") else set()
    return [name for name in known if name not in inherited] or list(known)


def _known_modifiers() -> dict[str, type[Any]]:
    """All modifiers that a recipe can name: llm-compressor's, ours, and those somebody else registered."""
    from llmcompressor.modifiers import Modifier, ModifierFactory

    import amoeba_plugin.modifiers  # noqa: F401  # registers ours

    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    known = {
        **ModifierFactory._main_registry,
        **ModifierFactory._experimental_registry,
        **ModifierFactory._registered_registry,
    }
    return {name: kind for name, kind in known.items() if kind is not Modifier}


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
    _check_training(recipe)
    _check_shape(recipe)


def _check_training(recipe: CheckedRecipe) -> None:
    from transformers.trainer_utils import SchedulerType

    from amoeba_plugin.modifiers import OneForAllDistillationModifier

    training = recipe.find(OneForAllDistillationModifier)
    if training is None:
        return
    where = f"{recipe.source}: OneForAllDistillationModifier"
    schedules = {each.value: each for each in SchedulerType}
    if training.lr_scheduler_type not in schedules:
        raise RecipeError(
            f"{where}: lr_scheduler_type '{training.lr_scheduler_type}' does not exist."
            f"{did_you_mean(training.lr_scheduler_type, schedules)} Possible: {', '.join(schedules)}"
        )
    try:
        training.options()
    except AmoebaError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_shape(recipe: CheckedRecipe) -> None:
    from amoeba_plugin.modifiers import DepthShrinkingModifier, SubnetExtractionModifier, WidthShrinkingModifier

    depth, width = recipe.find(DepthShrinkingModifier), recipe.find(WidthShrinkingModifier)
    if depth is not None and depth.keep_last > depth.min_depth:
        raise RecipeError(
            f"{recipe.source}: keep_last {depth.keep_last} of min_depth {depth.min_depth}: the smallest subnet cannot "
            "keep more last layers than it has layers; lower keep_last or raise min_depth"
        )
    extraction = recipe.find(SubnetExtractionModifier)
    if extraction is None:
        return
    shape = SubnetShape.parse(extraction.shape)
    widths = {Fraction(1)} if width is None else {parse_width(each) for each in width.widths}
    if depth is not None and shape.depth < depth.min_depth:
        raise ShapeError(
            f"{recipe.source}: shape {shape} is outside the space: its depth is below min_depth {depth.min_depth}; "
            f"extract {depth.min_depth} layers or more, or lower min_depth"
        )
    if shape.depth != int(shape.depth) and (
        depth is None or (depth.granularity == "layer" and depth.kept_layers is None)
    ):
        raise ShapeError(
            f"{recipe.source}: shape {shape} keeps half a layer, an attention or an MLP alone; set granularity: "
            "sublayer in DepthShrinkingModifier, or extract whole layers"
        )
    if shape.width not in widths:
        known = ", ".join(str(each) for each in sorted(widths, reverse=True))
        raise ShapeError(
            f"{recipe.source}: shape {shape} is outside the space: the widths are {known}; extract one of these, or "
            f'add "{shape.width}" to WidthShrinkingModifier.widths'
        )
