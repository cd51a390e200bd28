"""Directories that one process writes, and no other: a second one is refused before it computes anything.

The lock is the operating system's, on a file beside the directory: it ends with the process, however that dies.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from amoeba_plugin.errors import ArtifactError

logger = logging.getLogger(__name__)
PARTIAL, LOCK = "partial", "lock"
SECONDS = 0.2  # for another that is just letting go


def workplace(directory: Path, kind: str) -> Path:
    """Return where a directory's ``partial`` or ``lock`` is: beside it, or in it where beside it is another disk or
    none."""
    target = directory.resolve()
    if target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK)):
        return target / f".amoeba.{kind}"
    return target.with_name(f".{target.name}.{kind}")


@contextmanager
def owning(*directories: Path, alone: bool = False, patience: float = SECONDS) -> Iterator[None]:
    """Own directories, which need not exist, for a block of code; blocks of one process may be nested.

    Where the file system has no locks, a warning says so, and the block runs without.

    Args:
        directories: What will be written.
        alone: Also refuse a directory that another such block of this process owns.
        patience: Seconds to wait for another process that owns one.

    Raises:
        ArtifactError: If another process owns one of them, or one cannot be written.
    """
    with ExitStack() as stack:
        for directory in directories:
            stack.enter_context(_owning(directory, alone, patience))
        yield


@dataclass
class _Owned:
    lock: FileLock | None  # None: the file system has none
    blocks: int = 0
    alone: bool = False


_owned: dict[Path, _Owned] = {}  # by the lock's path
os.register_at_fork(after_in_child=_owned.clear)  # a child owns nothing of its parent's


@contextmanager
def _owning(directory: Path, alone: bool, patience: float) -> Iterator[None]:
    path = workplace(directory, LOCK)
    made = [] if path in _owned else _make_parents(path.parent, directory)
    try:
        owned = _owned.get(path) or _acquired(path, directory, patience)
        if alone and owned.alone:
            raise ArtifactError(f"{directory} is being written by this very process; name another directory")
        owned.blocks, owned.alone = owned.blocks + 1, owned.alone or alone
        try:
            yield
        finally:
            owned.blocks, owned.alone = owned.blocks - 1, owned.alone and not alone
            if owned.blocks == 0:
                _release(path)
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # it holds something by now
                parent.rmdir()


def _make_parents(parent: Path, directory: Path) -> list[Path]:
    """Make the directories that shall hold a lock, and return them, outermost first."""
    made: list[Path] = []
    try:
        for each in reversed([parent, *parent.parents]):
            if not each.exists():
                each.mkdir(exist_ok=True)
                made.append(each)
    except OSError as error:
        raise _not_writable(directory, error) from error
    return made


def _acquired(path: Path, directory: Path, patience: float) -> _Owned:
    lock = FileLock(path, timeout=patience)
    try:
        lock.acquire()
    except Timeout:
        raise ArtifactError(
            f"{directory} is being written by {_holder(path)}; wait for it or stop it, or name another directory"
        ) from None
    except PermissionError as error:
        raise _not_writable(directory, error) from error
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s): see to it that no other run writes there", directory, error)
        owned = _Owned(None)
    else:
        owned = _Owned(lock)
        holder = {"process": os.getpid(), "since": datetime.now().isoformat(" ", "seconds")}
        with suppress(OSError):  # a full disk: what owns it then has no name, and that is all
            path.write_text(json.dumps(holder), encoding="utf-8")
    _owned[path] = owned
    return owned


def _not_writable(directory: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{directory} cannot be written ({error.filename}: {error.strerror}); name another directory")


def _release(path: Path) -> None:
    lock = _owned.pop(path).lock
    if lock is not None:
        path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it has gone, and tries again
        lock.release()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']}, which began at {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it writes this just after it has the lock
        return "another process"
