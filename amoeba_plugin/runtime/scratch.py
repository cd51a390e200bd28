"""Directories for what is needed for a while only; what a killed process left of its own is deleted by the next one."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.ownership import LOCK, owning

PREFIX = "amoeba_scratch_"


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a new directory among the system's temporary ones, which vanishes with the block."""
    parent = Path(tempfile.gettempdir())
    _sweep(parent)
    directory = parent / f"{PREFIX}{uuid.uuid4().hex}"
    with owning(directory, alone=True):
        directory.mkdir(mode=0o700)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _sweep(parent: Path) -> None:
    locks = (path.name.removesuffix(f".{LOCK}")[1:] for path in parent.glob(f".{PREFIX}*.{LOCK}"))
    for name in {*locks, *(path.name for path in parent.glob(f"{PREFIX}*"))}:
        # refused: its process lives; not found: it has just ended
        with suppress(ArtifactError, FileNotFoundError), owning(parent / name, alone=True, patience=0):
            shutil.rmtree(parent / name, ignore_errors=True)
