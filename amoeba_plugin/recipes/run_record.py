"""``amoeba_run.json`` in an output directory: what was run, so that the same command given again is recognised."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from amoeba_plugin._version import __version__
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.whole_weights import weight_files

RUN_NAME, FORMAT = "amoeba_run.json", "amoeba_plugin.Run"
COMPARED = ("recipe", "model", "dataset", "options")


def run_record(plan: RecipePlan, model: str, dataset: str | None, options: RunOptions) -> dict[str, Any]:
    """Return what determines the result of a run: fields of all modifiers, names and sizes of inputs, and options.

    To be taken before the run, which writes what it selects into its modifiers.
    """
    recipe = [{type(each).__name__: each.model_dump()} for each in plan.modifiers]
    return {
        "format": FORMAT,
        "amoeba_plugin": __version__,
        "recipe": to_jsonable_python(recipe, fallback=str),
        "model": _sized(model),
        "dataset": None if dataset is None else _sized(dataset),
        "options": asdict(options),
    }


def write_run_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the record beside a result."""
    write_atomically(directory / RUN_NAME, json.dumps(record, indent=1).encode())


def other_inputs(directory: Path, record: dict[str, Any]) -> list[str] | None:
    """Return in what the run whose result is in a directory differed; ``None`` where there is no result of a run."""
    try:
        found = json.loads((directory / RUN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return None
    return [name for name in COMPARED if found.get(name) != record[name]]


def _sized(reference: str) -> dict[str, Any]:
    """Return a path or hub id, and the sizes of the files there."""
    path = Path(reference)
    files = weight_files(path) if path.is_dir() else [path] if path.is_file() else []
    return {"name": reference, "bytes": {each.name: each.stat().st_size for each in files if each.is_file()}}
