"""A full disk, as the writers of files report it, in words that name the directory."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amoeba_plugin.errors import ArtifactError

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Tell whether an error is a full disk, or a quota that is used up.

    >>> is_full(OSError(errno.ENOSPC, "No space left on device")), is_full(OSError(errno.EACCES, "Permission denied"))
    (True, False)
    >>> is_full(Exception("No space left on device (os error 28)"))
    True
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    # safetensors and tokenizers, written in Rust, raise classes of their own with its words
    return any(f"(os error {number})" in str(error) for number in FULL)


@contextmanager
def full_disk_named(directory: Path, advice: str) -> Iterator[None]:
    """Let a full disk be an error that names the directory where a block of code writes; others are left as they are.

    Args:
        directory: Where it writes.
        advice: What became of what was written, and what can be done: the end of the sentence.

    Raises:
        ArtifactError: If the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise ArtifactError(f"the disk of {directory} is full; {advice}") from error
