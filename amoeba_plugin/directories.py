"""Directories of results: there as a whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from amoeba_plugin.errors import ArtifactError


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
