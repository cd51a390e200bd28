"""What was measured, kept in a file, and how it is printed."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from amoeba_plugin.runtime.files import write_atomically

Losses = dict[str, float]  # loss in nats per token, by shape


class Results:
    """Losses by what gave them, in a JSON file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Losses] = json.loads(path.read_bytes()) if path.is_file() else {}

    def directory(self, key: str) -> Path:
        """Return where files may lie that belong to a key."""
        return self._path.with_suffix("") / re.sub(r"[^\w.-]+", "_", key)

    def of(self, key: str, measure: Callable[[], Losses]) -> Losses:
        """Return what is known under a key; measure and keep it where nothing is."""
        if key not in self._known:
            tqdm.write(key, file=sys.stderr)
            self._known[key] = measure()
            write_atomically(self._path, json.dumps(self._known, indent=1).encode())
        return self._known[key]


def header(title: str, what: str, columns: Sequence[str]) -> str:
    """Return a title and a table's first two lines in Markdown."""
    return f"\n### {title}\n\n| {what} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"


def row(name: str, cells: Sequence[str]) -> str:
    """Return a line of a table in Markdown."""
    return f"| {name} | {' | '.join(cells)} |"


def above(values: Sequence[float], dense: float) -> str:
    """Return the mean over seeds of losses above the dense model's and, of several, their standard deviation.

    >>> above([3.5, 3.7], dense=3.0), above([3.5], dense=3.0)
    ('0.600 ±0.141', '0.500')
    """
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) - dense:.3f}{spread}"
