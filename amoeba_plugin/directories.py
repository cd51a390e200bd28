"""Directories of results: there as a whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from amoeba_plugin.errors import ArtifactError


def require_writable(directory: Path, whole: bool = False) -> None:
    """Refuse a directory that could not be made or written to, before hours are spent on what goes there.

    It is tried in the nearest directory that exists, and nothing is left behind.

    Args:
        directory: Need not exist.
        whole: It will take the place of one that is made beside it, as :func:`whole_or_nothing` does.

    Raises:
        ArtifactError: If a file is in the way, or the system does not let this process write there.
    """
    tried = directory.parent if whole else directory
    existing = next(each for each in (tried, *tried.absolute().parents) if each.exists())
    try:
        with TemporaryDirectory(dir=existing, prefix=".amoeba-"):
            pass
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be written ({existing}: {error.strerror}); name another directory"
        ) from error


@contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """Yield a directory that takes the wanted name when the block ends well, and vanishes when it does not.

    Raises:
        ArtifactError: If the disk is full, or a file of weights could not be written.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if directory.is_dir():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(
                f"the disk of {directory} is full; nothing was kept there. Free space or name another --output-dir"
            ) from error
        raise
    except SafetensorError as error:  # its writer wraps the system's errors
        raise ArtifactError(
            f"{directory} could not be written ({error}); nothing was kept there. Free space or name another "
            "--output-dir"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
