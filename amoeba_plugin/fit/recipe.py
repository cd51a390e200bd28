"""The recipe of a fit: the shipped one, commented, with a run's own values in their places."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.recipes.files import require_shipped

MODIFIER = re.compile(r"^    (\w+Modifier):")
FIELD = re.compile(r"^(?P<name> +\w+: +)(?P<value>.*?)(?P<comment> *  #.*)?$")
#: Of the space, where no shape of the shipped recipe's can keep the budget.
LEAST_DEPTH, WIDTHS = Fraction(1, 2), ("1", "3/4", "1/2", "3/8", "1/4")


def fit_recipes(values: Mapping[str, Any], budget: Budget) -> list[str]:
    """Return the recipes that a fit may run, as texts: with the shipped space, and with smaller shapes.

    Args:
        values: By "Modifier.field"; a field of a field has only its own name.
        budget: That shall be kept.
    """
    limits = {limit.name: limit.in_unit(limit.most) for limit in budget.limits}
    flows = ",".join(map(str, budget.points))
    shipped = require_shipped("fit").read_text(encoding="utf-8")
    given = {**values, "SubnetExtractionModifier.budget": {"flow": flows, **limits}}
    smaller = {
        "DepthShrinkingModifier.min_depth": str(LEAST_DEPTH), "WidthShrinkingModifier.widths": list(WIDTHS),
    }  # fmt: skip
    return [filled(shipped, given), filled(shipped, {**given, **smaller})]


def smallest_space(layers: int) -> tuple[list[str], list[str]]:
    """Return the depths and widths of the space with the smallest shapes: one profile serves both."""
    return [str(depth) for depth in range(layers, math.ceil(LEAST_DEPTH * layers) - 1, -1)], list(WIDTHS)


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
