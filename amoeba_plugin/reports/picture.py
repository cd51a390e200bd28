"""Figures as files, SVG or PNG, and in a page, where they take their colours from its style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import write_atomically

FORMATS = (".svg", ".png")
# In a page these become variables of its style sheet, so that one file is right in light and in dark.
INK, FAINT, PAPER, BEFORE, AFTER = "#222222", "#dcdddf", "#ffffff", "#c8772e", "#2f6fb3"
PAGE_COLOURS = {
    INK: "var(--ink)", FAINT: "var(--line)", PAPER: "var(--card)", BEFORE: "var(--before)", AFTER: "var(--after)",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


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
    with _settings(name):
        draw().savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, buffer.getvalue())


def inline_svg(draw: Callable[[], Figure], name: str, title: str) -> str:
    """Return a figure as an ``<svg>`` element with the page's colours.

    Args:
        draw: Makes it.
        name: Of what it shows: its ids begin with it, so that figures of one page do not share them.
        title: For readers who do not see it.
    """
    buffer = io.StringIO()
    with _settings(name):
        draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head = rf'<svg viewBox="\1" role="img" aria-label="{title}">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', head, text, count=1)
    text = re.sub(r"(font: [^;\"]*?px )[^;\"]*", rf"\1{FONT.replace(chr(39), '')}", text)
    text = re.sub(r'id="(?![mp][0-9a-f]{10}")', f'id="{name}-', text)
    for drawn, wanted in PAGE_COLOURS.items():
        text = text.replace(drawn, wanted)
    return text


def _settings(name: str) -> AbstractContextManager[None]:
    """Have files that are the same in every run, and text that stays text."""
    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"})
