"""Whether disks have the room that something needs, asked before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from amoeba_plugin.errors import ArtifactError


def in_bytes(count: float) -> str:
    """Write a number of bytes for people, in decimal units.

    >>> in_bytes(7_140_000), in_bytes(13_500_000_000), in_bytes(300)
    ('7.1 MB', '13.5 GB', '0.0 MB')
    """
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def one_disk(first: Path, second: Path) -> bool:
    """Tell whether two paths, of which the last parts need not exist, are on one disk."""
    return _existing(first).stat().st_dev == _existing(second).stat().st_dev


def require_free(needed: Mapping[Path, int], advice: str) -> None:
    """Refuse to start what a disk has no room for.

    Args:
        needed: Bytes by path, each on a disk of its own; the last parts need not exist.
        advice: What can be done: the end of the sentence.

    Raises:
        ArtifactError: With what is needed and what is free.
    """
    for path, count in needed.items():
        free = shutil.disk_usage(_existing(path)).free
        if free < count:
            raise ArtifactError(
                f"the disk of {path} is too full: about {in_bytes(count)} are needed there, and {in_bytes(free)} are "
                f"free; {advice}"
            )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())
