"""Figures as files: SVG or PNG, the same bytes for the same figure."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import write_atomically

FORMATS = (".svg", ".png")


def require_picture(path: Path | None) -> None:
    """Refuse a name that says of no picture how it is written; ``None`` asks for none.

    Raises:
        ArtifactError: If so.
    """
    if path is not None and path.suffix.lower() not in FORMATS:
        raise ArtifactError(f"{path} is no name of a picture; end it with {' or '.join(FORMATS)}")


def save_figure(draw: Callable[[], Figure], path: Path | None, name: str) -> None:
    """Write a figure, whole or not at all.

    Args:
        draw: Makes it.
        path: Ends with one of the formats; ``None``: nothing is drawn.
        name: Of what it shows: ids in the file are made from it.

    Raises:
        ArtifactError: If the path is no name of a picture.
    """
    require_picture(path)
    if path is None:
        return
    buffer, kind = io.BytesIO(), path.suffix[1:].lower()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        draw().savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, buffer.getvalue())
