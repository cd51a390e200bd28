"""Where a recipe's results go: refused before anything is computed where something else is there, or nothing can be."""

from __future__ import annotations

import json
from pathlib import Path

from amoeba_plugin.elastic.checkpoint import require_replaceable
from amoeba_plugin.errors import ArtifactError, RecipeError
from amoeba_plugin.modifiers.layer_tuning import require_tuned_replaceable
from amoeba_plugin.runtime.files import is_vacant, require_writable


def require_new_directory(directory: Path, replaceable: str | None = None) -> None:
    """Refuse to write results over anything.

    Args:
        directory: Must not exist, or be empty.
        replaceable: Name of a JSON file whose presence, with a ``format`` of this package, marks older results.

    Raises:
        ArtifactError: If it is a file, holds something else, or cannot be written.
    """
    if is_vacant(directory) or (replaceable is not None and _is_result(directory / replaceable)):
        require_writable(directory, whole=replaceable is None)
        return
    what, advice = ("holds something else", ", or empty this one") if directory.is_dir() else ("is no directory", "")
    raise ArtifactError(f"{directory} exists and {what}, and nothing is overwritten; name another --output-dir{advice}")


def require_apart(field: str, directory: Path, output_dir: Path) -> None:
    """Refuse a directory that a recipe names where it cannot be written, or is not apart from the output directory.

    Args:
        field: Of the recipe: "elastic_dir" and "tuned_dir" are written whole or not at all, others are filled.
        directory: What it says.
        output_dir: Written whole or not at all.

    Raises:
        ArtifactError: If the directory cannot be written, or one that is written whole holds something else.
        RecipeError: If it is the output directory or in it, or would be written whole and hold it.
    """
    whole, output, named = field in ("elastic_dir", "tuned_dir"), output_dir.resolve(), directory.resolve()
    if output in (named, *named.parents) or (whole and named in output.parents):
        raise RecipeError(
            f"{field} {directory} and the output directory {output_dir} are the same, or one is in the other, and the "
            "checkpoint in it is to be there whole or not at all; name two directories side by side"
        )
    require_writable(directory, whole=whole)
    if field == "elastic_dir":
        require_replaceable(directory)
    if field == "tuned_dir":
        require_tuned_replaceable(directory)


def _is_result(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and str(document.get("format", "")).startswith("amoeba_plugin.")
