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
from amoeba_plugin.recipes.scalars import require_plain, value_of

MERGE = "tag:yaml.org,2002:merge"  # <<: the fields of an anchor
MOST_VALUES = 100_000
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
        if node is not None:
            _require_readable(node, source, {})
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is no YAML: {error}") from error
    except RecursionError:
        raise RecipeError(f"{source} nests hundreds of brackets or indents; a recipe reads {SKELETON}") from None
    if node is None:
        raise RecipeError(f"{source} is empty; a recipe reads {SKELETON}")
    return _mapping(node, f"{source} as a whole", "a stage")


def _require_readable(node: yaml.Node, source: str, sizes: dict[int, int]) -> int:
    """Refuse keys that are no words or given twice, scalars that mean something else than they look, endless anchors.

    Args:
        node: A part of the recipe.
        source: Where it is from, for messages.
        sizes: Of the parts that have been looked at, by identity; this one is added.

    Returns:
        How many values the part has where anchors are written out.
    """
    if id(node) in sizes:  # an anchor used twice, or one that holds itself
        return sizes[id(node)]
    sizes[id(node)] = 1
    if isinstance(node, yaml.ScalarNode):
        require_plain(node, source)
        return 1
    if isinstance(node, yaml.MappingNode):
        _require_distinct_keys(node, source)
    children = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
    size = sizes[id(node)] = 1 + sum(_require_readable(child, source, sizes) for child in children)
    if size > MOST_VALUES:
        raise RecipeError(
            f"{source}, line {node.start_mark.line + 1} holds more than {MOST_VALUES} values where its anchors are "
            "written out; no recipe needs so many"
        )
    return size


def _require_distinct_keys(node: yaml.MappingNode, source: str) -> None:
    seen: dict[Any, yaml.ScalarNode] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{source}, line {line}: a key must be a plain word")
        require_plain(key, source)
        meanings = [key.value] if key.tag == MERGE else [key.value, value_of(key, source)]
        for meaning in meanings:  # 10.5 and 10.50 are two texts and one key
            before = seen.setdefault(meaning, key)
            if before is not key:
                same = "" if before.value == key.value else f", as '{before.value}'"
                raise RecipeError(
                    f"{source}, line {line}: '{key.value}' was given in line {before.start_mark.line + 1} already"
                    f"{same}, and only the last one would count; remove one, or put the second modifier of a kind into "
                    "another group"
                )


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
                fields = value_of(_mapping(fields_node, f"{source}: {name.value}", "a field"), source)
                yield Entry(stage.value, group.value, name.value, fields, name.start_mark.line + 1)


def _children(node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    return list(node.value)


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
