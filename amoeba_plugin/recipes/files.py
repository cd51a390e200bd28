"""Where recipes are: files of one's own, and those that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

from amoeba_plugin.errors import ArtifactError, RecipeError, did_you_mean
from amoeba_plugin.runtime.files import require_writable, write_atomically
from amoeba_plugin.runtime.full_disk import full_disk_named

SUFFIXES = (".yaml", ".yml", ".json")


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name; in an installed wheel and in a checkout."""
    installed = Path(__file__).parent / "shipped"
    directory = installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the path of a recipe file, or of a shipped recipe by its name.

    Raises:
        RecipeError: If there is neither.
    """
    path = Path(name)
    try:
        there = path.is_file()
    except OSError as error:  # a name that no file can have
        raise RecipeError(f"no recipe '{name}': {error.strerror}") from error
    return path if there else require_shipped(name)


def require_shipped(name: str) -> Path:
    """Return the path of a shipped recipe.

    Raises:
        RecipeError: If there is none of that name.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        there = "that is a directory, not a file" if Path(name).is_dir() else "there is no such file"
        raise RecipeError(
            f"no recipe '{name}': {there}, and the shipped recipes are {', '.join(shipped)}."
            f"{did_you_mean(name, shipped)} 'amoeba recipes copy NAME PATH' gives you one to edit; whether something "
            "loads a shape, such as 24x7/8, tells 'amoeba loads SHAPE --model MODEL --flow ENGINE'"
        )
    return shipped[name]


def read_recipe(recipe: str | Path) -> tuple[str, str]:
    """Return where a recipe is from, for messages, and its text.

    Args:
        recipe: Path of a YAML or JSON file, the name of a shipped recipe, or the text itself (a string with a line
            break or a colon and a space).

    Raises:
        RecipeError: If there is no such recipe, or the file cannot be read.
    """
    if isinstance(recipe, str) and ("\n" in recipe or ": " in recipe):
        return "<text>", recipe
    path = recipe if isinstance(recipe, Path) else find_recipe(recipe)
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(f"{path}: a recipe is a YAML or JSON file ({', '.join(SUFFIXES)})")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            json.loads(text)  # as llm-compressor does
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the recipe {path} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the recipe {path} is no JSON ({error}); name it .yaml if it is YAML") from error
    return str(path), text


def copy_recipe(name: str, path: Path) -> Path:
    """Copy a shipped recipe and return the copy's path.

    Args:
        name: Of the recipe.
        path: File or directory to copy it to.

    Raises:
        RecipeError: If there is no recipe of that name.
        ArtifactError: If there is a file already, or no directory for it, or none that can be written.
    """
    source = require_shipped(name)
    target = path / source.name if path.is_dir() else path
    if target.exists():
        raise ArtifactError(f"{target} exists; nothing is overwritten: name another path")
    if not target.parent.is_dir():
        raise ArtifactError(f"there is no directory {target.parent} to copy the recipe into; make it first")
    require_writable(target.parent)
    with full_disk_named(target.parent, "free space or name another path"):
        write_atomically(target, source.read_bytes())
    return target


def purposes() -> dict[str, str]:
    """Return by name what the shipped recipes are for: the first sentence of the comment that each begins with."""
    return {name: _first_sentence(path) for name, path in shipped_recipes().items()}


def _first_sentence(recipe: Path) -> str:
    comment = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].partition(": ")[0].rstrip(".:")
