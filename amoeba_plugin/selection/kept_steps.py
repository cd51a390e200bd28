"""Steps of a selection, kept on disk when they are done, so that a selection that was killed goes on behind the last.

A step is a pair of files: ``NAME.safetensors``, and ``NAME.json`` with what the step depends on, its values, and the
digest of both. The JSON is written last: a killed run leaves the whole step or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from amoeba_plugin.elastic.strategy import DepthStrategy, WidthStrategy
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import clear_partials, write_atomically
from amoeba_plugin.runtime.full_disk import full_disk_named
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.ranks import from_first_rank, rank

logger = logging.getLogger(__name__)
FORMAT, VERSION = "amoeba_plugin.SelectionStep", 1


@dataclass(frozen=True)
class Step:
    """What a step found.

    Attributes:
        tensors: By name; none shares memory with another.
        values: Anything that JSON holds.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptSteps:
    """Computes steps that a directory does not hold, and takes the others from there.

    Attributes:
        directory: That only this run writes; ``None``: every step is computed, and nothing is written.
        identity: What the steps depend on: model, data, fields of the recipe.
    """

    directory: Path | None = None
    identity: Mapping[str, str] = field(default_factory=dict)

    def also(self, **identity: str) -> KeptSteps:
        """Return them for steps that depend on more."""
        return replace(self, identity={**self.identity, **identity})

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return a step; every rank gets what the first one reads, or computes its part.

        Args:
            name: Of its files.
            compute: Computes it, on all ranks together.

        Raises:
            ArtifactError: If it is there and of another selection, or damaged; or the disk is full, or another process
                writes the directory.
        """
        if self.directory is None:
            return compute()
        with owning(*([self.directory] if rank() == 0 else [])):
            found = self._read(self.directory / f"{name}.json")
            if found is None:
                found = compute()
                self._write(self.directory / f"{name}.json", found)
        return found

    def tensors(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return a step that has no values; see :meth:`step`."""
        return self.step(name, lambda: Step(compute())).tensors

    def _read(self, path: Path) -> Step | None:
        for each in (path, _beside(path)):
            if rank() == 0:
                clear_partials(each)
        told = _from_disk(path)
        if told is None:
            return None
        digest, values = self._opened(path, told)
        data = _from_disk(_beside(path)) or b""
        if _digest(data, values) != digest:
            raise _damaged(path, "its digest is another, or its tensors are missing")
        try:
            # copies, for memory aligned as that of tensors that were computed
            found = Step({key: each.clone() for key, each in load_tensors(data).items()}, values)
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        logger.info("the selection goes on: %s is there, and not computed again", path)
        return found

    def _opened(self, path: Path, told: bytes) -> tuple[str, dict[str, Any]]:
        """Return the digest and the values of a step, whose identity is ours."""
        try:
            document: dict[str, Any] = json.loads(told)
            if document["format"] != FORMAT or document["version"] != VERSION:
                raise ValueError(f"format {document['format']}, version {document['version']}")
            found, digest, values = dict(document["identity"]), str(document["sha256"]), dict(document["values"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, repr(error)) from error
        names = [*self.identity, *(name for name in found if name not in self.identity)]
        other = [name for name in names if found.get(name) != self.identity.get(name)]
        if other:
            differences = "; ".join(
                f"{name} is {self.identity.get(name, 'none')}, there it is {found.get(name, 'none')}" for name in other
            )
            raise ArtifactError(
                f"{path} is of another selection: {differences}. Resume with the same model, calibration data and "
                "recipe, empty the directory, or name another resume_dir"
            )
        return digest, values

    def _write(self, path: Path, step: Step) -> None:
        if rank() != 0:
            return
        values = dict(step.values)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save_tensors({key: each.detach().cpu().contiguous() for key, each in step.tensors.items()})
        document = {
            "format": FORMAT,
            "version": VERSION,
            "identity": dict(self.identity),
            "values": values,
            "sha256": _digest(data, values),
        }
        advice = "free space and start again: the selection goes on with the steps that are there"
        with full_disk_named(path.parent, advice):
            write_atomically(_beside(path), data)
            write_atomically(path, json.dumps(document, indent=1, allow_nan=False).encode())


NOWHERE = KeptSteps()


def _from_disk(path: Path) -> bytes | None:
    return from_first_rank(path.read_bytes() if rank() == 0 and path.exists() else None)


def _beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _digest(data: bytes, values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode() + data).hexdigest()


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged, or no step of a selection ({why}); delete it, or name another resume_dir")


def depth_digest(depth: DepthStrategy) -> str:
    """Return the SHA-256 of what every depth keeps."""
    return hashlib.sha256(json.dumps(depth.table, sort_keys=True).encode()).hexdigest()


def width_digest(width: WidthStrategy) -> str:
    """Return the SHA-256 of the order of all units, and of how many every width keeps."""
    units = {str(share): dict(units) for share, units in width.units.items()}
    whole = hashlib.sha256(json.dumps(units, sort_keys=True).encode())
    for key, order in sorted(width.order.items()):
        whole.update(key.encode() + order.cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()
