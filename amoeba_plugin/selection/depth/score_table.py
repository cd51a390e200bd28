"""The table of a search over depths: every score measured so far, in memory and on disk, so that it can be resumed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import clear_partials, write_atomically
from amoeba_plugin.runtime.full_disk import full_disk_named
from amoeba_plugin.runtime.ranks import from_first_rank, rank
from amoeba_plugin.selection.depth.steps import Granularity, Removed
from amoeba_plugin.selection.objectives import Score

logger = logging.getLogger(__name__)
FORMAT, VERSION = "amoeba_plugin.DepthSearch", 1
NAMES: Mapping[Granularity, str] = {"layer": "depth_search.json", "sublayer": "sublayer_search.json"}


@dataclass
class MeasuredTable:
    """Measures sets of removed layers once, and writes what it knows after every call.

    A search that is repeated asks for the same sets in the same order, so with a table that holds some of them it goes
    on where it was killed, and ends with the same strategy.

    Attributes:
        measure: Scores the model without each of some sets of layers.
        identity: What the scores depend on: model, data, objective, dtype.
        path: The file; None: in memory only.
        scores: By set of steps removed, those read from the file and those measured here.
        measured: How many of them this process measured.
    """

    measure: Callable[[Sequence[Removed]], Sequence[Score]]
    identity: Mapping[str, str]
    path: Path | None = None
    scores: dict[Removed, Score] = field(default_factory=dict)
    measured: int = 0

    @classmethod
    def resumed(
        cls,
        measure: Callable[[Sequence[Removed]], Sequence[Score]],
        identity: Mapping[str, str],
        directory: Path | None,
        granularity: Granularity = "layer",
    ) -> MeasuredTable:
        """Return a table that begins with what a directory holds; every rank gets what the first one reads.

        Each granularity has a file of its own there: the same numbers are other removals.

        Raises:
            ArtifactError: If that is of another model, other data or another objective, or is damaged.
        """
        if directory is None:
            return cls(measure, identity)
        path = directory / NAMES[granularity]
        data = from_first_rank(path.read_bytes() if rank() == 0 and path.exists() else None)
        if rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            clear_partials(path)
        scores = {} if data is None else _scores(path, data, identity)
        if scores:
            logger.info("depth search goes on with the %d scores in %s", len(scores), path)
        return cls(measure, identity, path, scores)

    def __call__(self, sets: Sequence[Removed]) -> list[Score]:
        """Return the scores of the model without each of the sets.

        Raises:
            ArtifactError: If the disk is full.
        """
        missing = [removed for removed in dict.fromkeys(sets) if removed not in self.scores]
        if missing:
            self.scores.update(zip(missing, self.measure(missing), strict=True))
            self.measured += len(missing)
            self._save()
        return [self.scores[removed] for removed in sets]

    def _save(self) -> None:
        if self.path is None or rank() != 0:
            return
        document = {
            "format": FORMAT,
            "version": VERSION,
            **self.identity,
            "scores": [
                {"removed": sorted(removed), "value": _number(score.value), "loss": _number(score.loss)}
                for removed, score in self.scores.items()
            ],
        }
        advice = "free space and search again: it goes on with the scores that are there"
        with full_disk_named(self.path.parent, advice):
            write_atomically(self.path, json.dumps(document, allow_nan=False).encode())


def _scores(path: Path, data: bytes, identity: Mapping[str, str]) -> dict[Removed, Score]:
    try:
        document: dict[str, Any] = {"repair": "none", **json.loads(data)}  # of old tables nothing was repaired
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"format {document['format']}, version {document['version']}")
        found = {name: document[name] for name in identity}
        scores = {
            Removed(entry["removed"]): Score(float(entry["value"]), float(entry["loss"]))
            for entry in document["scores"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged, or no table of a depth search ({error!r}); delete it, or name another resume_dir"
        ) from error
    other = [name for name in identity if found[name] != identity[name]]
    if other:
        differences = "; ".join(f"{name} is {identity[name]}, there it is {found[name]}" for name in other)
        raise ArtifactError(
            f"{path} holds the scores of another search: {differences}. Resume with the same model, calibration data "
            "and objective, or name another resume_dir"
        )
    return scores


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no word for NaN
