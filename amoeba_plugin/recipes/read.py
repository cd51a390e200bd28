"""From a recipe's file to its plan: all that can be checked without a model.

What the text alone tells is refused before llm-compressor is imported, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_plugin.recipes.files import read_recipe
from amoeba_plugin.recipes.text import entries_of

if TYPE_CHECKING:
    from amoeba_plugin.recipes.plan import RecipePlan


def plan_recipe(recipe: str | Path) -> RecipePlan:
    """Read a recipe, once, and check everything that can be checked without a model.

    Args:
        recipe: Path of a YAML or JSON file, the name of a shipped recipe, or the text itself (a string with a line
            break or a colon and a space).

    Returns:
        The recipe with its modifiers made; no session was started, nothing was loaded.

    Raises:
        RecipeError: On the first thing that cannot run, or that llm-compressor would silently ignore.
        ShapeError: If a shape that the recipe names is one that its selection does not make.
    """
    source, text = read_recipe(recipe)
    entries = entries_of(text, source)
    from amoeba_plugin.recipes.fields import create_modifier
    from amoeba_plugin.recipes.plan import RecipePlan

    modifiers = tuple(create_modifier(entry, source) for entry in entries)
    plan = RecipePlan(source, modifiers, tuple(entry.line for entry in entries))
    plan.require_consistent()
    return plan
