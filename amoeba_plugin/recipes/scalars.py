"""Scalars of a recipe that YAML reads otherwise than they look, or that no field can hold."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from amoeba_plugin.errors import RecipeError

# What people and YAML read alike; it also has numbers of base 2, 8, 16 and 60, infinity, and numbers that are none.
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*|[0-9_]*\.[0-9_]*([eE][-+][0-9]+)?)")
LONGEST_NUMBER = 50  # characters
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
DATE = "tag:yaml.org,2002:timestamp"


def require_plain(scalar: yaml.ScalarNode, source: str) -> None:
    """Refuse a scalar that is not read as it is written: ``0x3`` is 3 to YAML, ``1:30`` is 90, ``010`` is 8.

    Raises:
        RecipeError: With the line, what YAML makes of it, and how to write it.
    """
    where, text = f"{source}, line {scalar.start_mark.line + 1}", scalar.value
    unwritable = next((each for each in text if each == "\0" or "\ud800" <= each <= "\udfff"), None)
    if unwritable is not None:
        raise RecipeError(
            f"{where}: {text!r} holds the character U+{ord(unwritable):04X}, which no file and no name can; leave it "
            "out"
        )
    if scalar.style is not None or scalar.tag not in (*NUMBERS, DATE):
        return
    read = None if scalar.tag == DATE else _number(scalar, source)
    if read is not None and math.isfinite(read) and DECIMAL.fullmatch(text):
        return
    meaning = "a date" if scalar.tag == DATE else "no number" if read is None else f"the number {read}"
    raise RecipeError(f"{where}: {text} is {meaning} to YAML; quote it, '{text}', or write a plain decimal number")


def _number(scalar: yaml.ScalarNode, source: str) -> float | None:
    if len(scalar.value) > LONGEST_NUMBER:
        return None
    number: float = value_of(scalar, source)
    return number


def value_of(node: yaml.Node, source: str) -> Any:
    """Return what a part of a recipe means.

    Raises:
        RecipeError: If it is not plain data.
    """
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except Exception as error:  # constructors raise anything of a text that does not fit its tag
        what = str(error) or type(error).__name__
        raise RecipeError(f"{source}, line {node.start_mark.line + 1} holds what is not plain data: {what}") from error
    finally:
        loader.dispose()
