"""Figures are written as their names say, the same in every run, and never half."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.reports.picture import require_picture, save_figure


def drawn() -> Figure:
    figure = Figure()
    figure.add_subplot().plot([1, 2], [2, 1])
    return figure


def test_a_picture_is_svg_or_png_and_the_same_in_every_run(tmp_path: Path):
    for name in ("a.svg", "b.svg", "a.PNG"):
        save_figure(drawn, tmp_path / name, "line")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_other_names_are_refused_before_anything_is_drawn(tmp_path: Path):
    def never() -> Figure:
        raise AssertionError

    with pytest.raises(ArtifactError, match=r"end it with .svg or .png"):
        save_figure(never, tmp_path / "a.jpeg", "line")
    assert not list(tmp_path.iterdir())
    require_picture(None)
    save_figure(never, None, "line")
