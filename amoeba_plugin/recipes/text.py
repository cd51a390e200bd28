"""The text of a recipe: stages that hold groups that hold modifiers, with the lines they stand on.

llm-compressor ignores what it does not recognise: a stage that does not end in ``_stage``, a list where a mapping
belongs, a key given twice. Everything of that kind is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from amoeba_plugin.errors import RecipeError

STAGE_SUFFIX, GROUP_SUFFIX = "_stage", "_modifiers"
SKELETON = "some_stage: {some_modifiers: {SomeModifier: {field: value}}}"


@dataclass(frozen=True)
class Entry:
    """One modifier of a recipe as it was written."""

    stage: str
    group: str
    name: str
    fields: dict[str, Any]
    line: int


def _parse(text: str, source: str) -> yaml.MappingNode:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is no YAML: {error}") from error
    if node is None:
        raise RecipeError(f"{source} is empty; a recipe reads {SKELETON}")
    _require_distinct_keys(node, source, set())
    return _mapping(node, f"{source} as a whole", "a stage")


def _require_distinct_keys(node: yaml.Node, source: str, visited: set[int]) -> None:
    if id(node) in visited:  # an anchor used twice, or one that holds itself
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _require_distinct_keys(child, source, visited)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Any, yaml.ScalarNode] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{source}, line {line}: a key must be a plain word")
        for meaning in (key.value, *_constructed(key)):  # 10.5 and 10.50 are two texts and one key
            before = seen.setdefault(meaning, key)
            if before is not key:
                same = "" if before.value == key.value else f", as '{before.value}'"
                raise RecipeError(
                    f"{source}, line {line}: '{key.value}' was given in line {before.start_mark.line + 1} already"
                    f"{same}, and only the last one would count; remove one, or put the second modifier of a kind into "
                    "another group"
                )
        _require_distinct_keys(value, source, visited)


def _constructed(key: yaml.ScalarNode) -> list[Any]:
    """Return what a key is read as, or nothing where it cannot be read: that is refused with the value."""
    loader = yaml.SafeLoader("")
    try:
        return [loader.construct_object(key)]
    except (yaml.YAMLError, ValueError):
        return []
    finally:
        loader.dispose()


def _mapping(node: yaml.Node, what: str, of: str) -> yaml.MappingNode:
    if isinstance(node, yaml.MappingNode):
        return node
    kind = "a list" if isinstance(node, yaml.SequenceNode) else f"'{node.value}'" if node.value else "nothing"
    advice = "; indent its fields below it, or write {} for no fields" if of == "a field" else ""
    raise RecipeError(
        f"{what} (line {node.start_mark.line + 1}) holds {kind} where a mapping belongs, from the name of "
        f"{of} to its content{advice}. llm-compressor would ignore it or stop; a recipe reads {SKELETON}"
    )


def entries_of(text: str, source: str) -> tuple[Entry, ...]:
    """Return the modifiers of a recipe in their order, at least one.

    Args:
        text: YAML or JSON.
        source: Where it is from, for messages.

    Raises:
        RecipeError: If it is not a recipe, or llm-compressor would silently ignore a part of it.
    """
    entries = tuple(_entries(text, source))
    if not entries:
        raise RecipeError(f"{source} holds no modifier; a recipe reads {SKELETON}")
    stages: dict[str, str] = {}
    for entry in entries:
        if stages.setdefault(entry.group, entry.stage) != entry.stage:
            raise RecipeError(
                f"{source}, line {entry.line}: the group '{entry.group}' is in {stages[entry.group]} and in "
                f"{entry.stage}; the recipe saved beside a checkpoint would lose one of them: give them different names"
            )
    return entries


def _entries(text: str, source: str) -> Iterator[Entry]:
    for stage, stage_node in _children(_parse(text, source)):
        _require_suffix(stage, STAGE_SUFFIX, "stage", source)
        groups = _children(_mapping(stage_node, f"{source}: {stage.value}", "a modifier group"))
        _require_content(groups, stage, "modifier group", source)
        for group, group_node in groups:
            _require_suffix(group, GROUP_SUFFIX, "modifier group", source)
            modifiers = _children(_mapping(group_node, f"{source}: {stage.value}.{group.value}", "a modifier"))
            _require_content(modifiers, group, "modifier", source)
            for name, fields_node in modifiers:
                fields = _value(_mapping(fields_node, f"{source}: {name.value}", "a field"))
                yield Entry(stage.value, group.value, name.value, fields, name.start_mark.line + 1)


def _children(node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    return list(node.value)


def _value(node: yaml.MappingNode) -> dict[str, Any]:
    loader = yaml.SafeLoader("")
    try:
        value: dict[str, Any] = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise RecipeError(f"line {node.start_mark.line + 1} holds what is not plain data: {error}") from error
    finally:
        loader.dispose()
    return value


def _require_suffix(key: yaml.ScalarNode, suffix: str, kind: str, source: str) -> None:
    if not key.value.endswith(suffix) or key.value == suffix:
        raise RecipeError(
            f"{source}, line {key.start_mark.line + 1}: the {kind} '{key.value}' would be ignored by llm-compressor, "
            f"because its name does not end in '{suffix}'; name it '{key.value.strip('_') or 'some'}{suffix}'"
        )


def _require_content(children: list[Any], key: yaml.ScalarNode, kind: str, source: str) -> None:
    if not children:
        raise RecipeError(
            f"{source}, line {key.start_mark.line + 1}: '{key.value}' holds no {kind}; fill it or remove it"
        )
