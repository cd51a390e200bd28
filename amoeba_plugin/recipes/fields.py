"""One modifier of a recipe: its name, the names of its fields and their values, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from amoeba_plugin.errors import AmoebaError, RecipeError, did_you_mean
from amoeba_plugin.recipes.text import GROUP_SUFFIX, Entry

# Fields every llm-compressor modifier has and none acts on: a modifier with `start: 1` never starts.
DEAD_FIELDS = ("start", "end", "update", "index")
MAPPING_ERRORS = ("model_type", "dict_type")  # pydantic's names of the errors, and its messages name classes


def create_modifier(entry: Entry, source: str) -> Any:
    """Return the modifier that an entry of a recipe describes.

    Args:
        entry: From :func:`amoeba_plugin.recipes.text.entries_of`.
        source: Where the recipe is from, for messages.

    Raises:
        RecipeError: If nobody registered it, or a field is unknown, has no effect or holds what is not possible.
    """
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
    if dead and kind.__module__.startswith("amoeba_plugin."):
        raise RecipeError(
            f"{where}: '{dead[0]}' has no effect, modifiers run once, in the order of the recipe; remove it"
        )
    _require_known_fields(kind, entry.fields, where)
    _require_known_schemes(entry.fields.get("scheme"), where)
    return _instantiate(kind, entry, where)


def _instantiate(kind: type[Any], entry: Entry, where: str) -> Any:
    from pydantic import ValidationError

    try:
        return kind(group=entry.group.removesuffix(GROUP_SUFFIX), **entry.fields)
    except ValidationError as error:
        raise RecipeError(f"{where}: {'; '.join(_problems(error.errors(include_url=False)))}") from error
    except (AmoebaError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _problems(errors: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is wrong, field by field, with what every kind that a field may be says of it."""
    by_field: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for error in errors:
        # pydantic puts the kinds of a union among the names: adapter, "literal['none']"
        field = tuple(str(part) for part in error["loc"] if "[" not in str(part))
        by_field.setdefault(field, []).append(error)
    for field, found in by_field.items():
        if any(other[: len(field)] == field and other != field for other in by_field):
            continue  # it is the right kind of thing, and wrong within
        own_words = [error for error in found if error["type"] in ("missing", "extra_forbidden", "value_error")]
        yield _problem(".".join(field), own_words[:1] or found)


def _problem(field: str, errors: Sequence[Mapping[str, Any]]) -> str:
    first = errors[0]
    message = first["msg"].removeprefix("Value error, ") + _quoting(first)
    if first["type"] == "missing":
        return f"{field} must be given"
    if first["type"] == "extra_forbidden":
        return f"'{field}' is no field"
    if first["type"] == "value_error" or not field:
        return message if field in message else f"{field}: {message}"
    wants = [_wanted(error) + _quoting(error) for error in errors]
    return f"{field}: {first['input']!r} is not possible ({', or '.join(wants)})"


def _quoting(error: Mapping[str, Any]) -> str:
    """Return what to do where YAML made something else of what may be meant as a word."""
    given = error["input"]
    if isinstance(given, bool):
        return "; YAML reads yes, no, on and off as true and false: quote a word"
    return "; quote it" if error["type"] == "string_type" and isinstance(given, int | float) else ""


def _wanted(error: Mapping[str, Any]) -> str:
    message: str = error["msg"]
    if error["type"] in MAPPING_ERRORS:
        return "input should be a mapping, {field: value}"
    return message[:1].lower() + message[1:]


def _require_known_fields(kind: type[Any], fields: Mapping[str, Any], where: str) -> None:
    from pydantic import BaseModel

    known = {name: info for name, info in kind.model_fields.items() if name != "group" and not name.endswith("_")}
    for name, value in fields.items():
        if name not in known:
            read = "" if isinstance(name, str) else ", as YAML reads it,"
            raise RecipeError(
                f"{where}: '{name}'{read} is no field.{did_you_mean(str(name), known)} "
                f"Fields: {', '.join(_own_first(kind, known))}"
            )
        choices = get_args(known[name].annotation) or (known[name].annotation,)  # the parts of a union
        if isinstance(value, bool) and {int, float}.intersection(choices) and bool not in choices:
            raise RecipeError(f"{where}: {name}: {value} is not possible, a number is wanted; YAML reads yes and no so")
        models = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
        if isinstance(value, Mapping) and len(models) == 1:
            _require_known_fields(models[0], value, f"{where}.{name}")


def _require_known_schemes(given: object, where: str) -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, is_preset_scheme

    for name in [given] if isinstance(given, str) else given if isinstance(given, dict) else ():
        if not is_preset_scheme(str(name)):
            raise RecipeError(
                f"{where}: there is no scheme '{name}'.{did_you_mean(str(name), PRESET_SCHEMES)} "
                f"Known: {', '.join(PRESET_SCHEMES)}; others are described in config_groups"
            )


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
