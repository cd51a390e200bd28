"""Directories and files of results: there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.full_disk import is_full
from amoeba_plugin.runtime.ownership import LOCK, PARTIAL, owning, workplace

FILLING = ".amoeba.filling"  # in a directory that is being filled: whatever else is in it is not whole
BEING_WRITTEN = ".partial"  # ends the names of files that are not there yet
OLDER = ".amoeba.older"
INSIDE = (FILLING, f".amoeba.{PARTIAL}", f".amoeba.{LOCK}")


def require_writable(directory: Path, whole: bool = False) -> None:
    """Refuse a directory that could not be made or written to, before hours are spent on what goes there.

    It is tried in the nearest directory that exists, and nothing is left behind.

    Args:
        directory: Need not exist.
        whole: It will be written by :func:`whole_or_nothing`.

    Raises:
        ArtifactError: If a file is in the way, or the system does not let this process write there.
    """
    tried = workplace(directory, PARTIAL).parent if whole else directory
    existing = next(each for each in (tried, *tried.absolute().parents) if each.exists())
    try:
        with TemporaryFile(dir=existing):  # without a name, where the file system can: a kill leaves nothing
            pass
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be written ({existing}: {error.strerror}); name another directory"
        ) from error


def is_vacant(directory: Path) -> bool:
    """Tell whether a directory is missing, empty, or holds what a killed :func:`whole_or_nothing` left in it."""
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    return (directory / FILLING).exists() or all(entry.name in INSIDE for entry in directory.iterdir())


@contextmanager
def whole_or_nothing(directory: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a directory that takes the wanted name when the block ends well, and vanishes when it does not.

    Where the wanted one exists, it stays and is filled: it may be a link, the current directory, or a mounted disk.

    Args:
        directory: Missing or empty.
        replace: It may also be full; what is in it goes when the block ends well.

    Raises:
        ArtifactError: If another process writes the directory, the disk is full, a file of weights could not be
            written, or the directory is full.
    """
    with owning(directory, alone=True), _filled(workplace(directory, PARTIAL), directory) as partial:
        yield partial
        _put(partial, directory.resolve(), replace)


@contextmanager
def _filled(partial: Path, directory: Path) -> Iterator[Path]:
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        partial.mkdir(parents=True)
        yield partial
    except Exception as error:  # tokenizers raise a bare one
        if is_full(error):
            raise ArtifactError(
                f"the disk of {directory} is full; nothing was kept there. Free space or name another directory"
            ) from error
        if isinstance(error, SafetensorError):  # its writer wraps the system's errors
            raise ArtifactError(
                f"{directory} could not be written ({error}); nothing was kept there. Name another directory"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all: a sibling is written, synced, and renamed over it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{BEING_WRITTEN}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk does not say of which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def clear_partials(path: Path) -> None:
    """Delete what killed calls of :func:`write_atomically` left of a file that only this process writes."""
    for partial in path.parent.glob(f".{path.name}.*{BEING_WRITTEN}"):
        partial.unlink(missing_ok=True)


def _put(partial: Path, target: Path, replace: bool) -> None:
    if not target.is_dir():
        partial.rename(target)
        return
    if not replace and not is_vacant(target):
        raise ArtifactError(f"{target} has been filled by something else meanwhile; nothing is overwritten")
    half = (target / FILLING).exists()  # what a killed process left stays half where this fails, too
    (target / FILLING).touch()
    try:
        _exchange(partial, target)
        half = False
    finally:
        if not half:
            (target / FILLING).unlink()


def _exchange(partial: Path, target: Path) -> None:
    """Let one directory's entries take the place of another's, by renames, which need no room and can be undone."""
    before = [entry for entry in target.iterdir() if entry.name not in INSIDE]
    new, older = list(partial.iterdir()), partial / OLDER
    older.mkdir()  # goes with the other directory
    moved: list[tuple[Path, Path]] = []
    try:
        for entry, place in [(entry, older) for entry in before] + [(entry, target) for entry in new]:
            shutil.move(entry, place / entry.name)
            moved.append((entry, place / entry.name))
    except BaseException:
        for entry, placed in reversed(moved):
            shutil.move(placed, entry)
        raise
