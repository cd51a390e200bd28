"""The recipe of a fit: the shipped one, commented, with a run's own values in their places."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.recipes.files import require_shipped

MODIFIER = re.compile(r"^    (\w+Modifier):")
FIELD = re.compile(r"^(?P<name> +\w+: +)(?P<value>.*?)(?P<comment> *  #.*)?$")
Space = tuple[str, list[str]]
#: Least depths and widths; the second where no shape of the first, the shipped recipe's, can keep the budget.
SPACES: tuple[Space, ...] = (
    ("2/3", ["1", "7/8", "3/4", "5/8", "1/2"]),
    ("1/2", ["1", "3/4", "1/2", "3/8", "1/4"]),
)


def fit_recipe(values: Mapping[str, Any], budget: Budget, space: Space) -> str:
    """Return the recipe as a text.

    Args:
        values: By "Modifier.field"; a field of a field has only its own name.
        budget: That shall be kept.
        space: The least depth, and the widths.
    """
    limits = {limit.name: limit.in_unit(limit.most) for limit in budget.limits}
    flows = ",".join(map(str, budget.points))
    own = {
        "DepthShrinkingModifier.min_depth": space[0],
        "WidthShrinkingModifier.widths": space[1],
        "SubnetExtractionModifier.budget": {"flow": flows, **limits},
    }
    return filled(require_shipped("fit").read_text(encoding="utf-8"), {**own, **values})


def filled(text: str, values: Mapping[str, Any]) -> str:
    """Return a recipe with other values of some fields, and its comments; fields that it has not come first.

    >>> filled("s:\\n  m:\\n    AModifier:\\n      a: 1  # one", {"AModifier.a": "x"}).splitlines()[-1]
    '      a: "x"  # one'
    """
    lines, left, modifier = text.splitlines(), dict(values), ""
    for number, line in enumerate(lines):
        named = MODIFIER.match(line)
        modifier = named[1] if named else modifier
        field = FIELD.match(line)
        key = f"{modifier}.{field['name'].strip(' :')}" if field else ""
        if field and key in left:
            lines[number] = f"{field['name']}{json.dumps(left.pop(key))}{field['comment'] or ''}"  # JSON is YAML
    for key, value in left.items():  # a field that only makes sense with others is not in the file
        modifier, _, name = key.partition(".")
        at = next(number for number, line in enumerate(lines) if line.strip() == f"{modifier}:")
        lines.insert(at + 1, f"      {name}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"
