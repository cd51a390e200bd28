"""Plots as inline SVG that takes its colours from the page, so that one file is right in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn in these colours, then replaced by variables of the page's style sheet.
INK, FAINT, BEFORE, AFTER = "#010203", "#040506", "#070809", "#0a0b0c"
PAGE_COLOURS = {INK: "var(--ink)", FAINT: "var(--line)", BEFORE: "var(--before)", AFTER: "var(--after)"}
NAME_WIDTH, NAME_HEIGHT = 34, 10  # of a shape's name in a plot, in points
DOT = 7  # across, in points
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def gap_plot(points: Sequence[tuple[str, float, float, float | None]]) -> str:
    """Draw the loss gap to the dense model over block parameters, before and after one-for-all training.

    Args:
        points: (shape, share of block parameters, gap before, gap after or ``None``), gaps in nats per token.

    Returns:
        An ``<svg>`` element.
    """
    figure = Figure(figsize=(8.2, 4.0))
    axes = _axes(figure, 111, "share of the dense model's block parameters", "loss above dense, nats/token")
    for _, share, before, after in points:
        if after is not None:
            axes.plot([100 * share] * 2, [before, after], color=FAINT, linewidth=1.5, zorder=1)
    shares = [100 * share for _, share, _, _ in points]
    axes.scatter(shares, [before for *_, before, _ in points], s=38, color=BEFORE, label="selection alone", zorder=3)
    trained = [(100 * share, after) for _, share, _, after in points if after is not None]
    if trained:
        axes.scatter(
            [share for share, _ in trained],
            [after for _, after in trained],
            s=38,
            color=AFTER,
            label="after one-for-all training",
            zorder=3,
        )
    axes.axhline(0, color=INK, linewidth=1)
    axes.annotate(
        "dense", (1, 0), (-4, 4), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=INK
    )
    axes.invert_xaxis()
    axes.margins(x=0.06, y=0.12)
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")
    figure.set_layout_engine("tight")
    figure.draw_without_rendering()
    _label(axes, [(shape, 100 * share, before) for shape, share, before, _ in points])
    return _svg(figure, "gap", "Loss gap to the dense model over block parameters, before and after training")


def latency_plot(points: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw measured latency, prefill and decoding side by side, over block parameters.

    Args:
        points: (name, share of block parameters, prefill in ms, decode in ms per token).

    Returns:
        An ``<svg>`` element with two panels, both from zero.
    """
    figure = Figure(figsize=(8.2, 3.4))
    panels = ((121, "prefill, ms", 2), (122, "decode, ms per token", 3))
    for position, label, column in panels:
        axes = _axes(figure, position, "share of the dense model's block parameters", label)
        axes.scatter(
            [100 * point[1] for point in points],
            [float(point[column]) for point in points],
            s=38,
            color=AFTER,
            zorder=3,
        )
        axes.set_ylim(0, 1.2 * max(float(point[column]) for point in points))
        axes.margins(x=0.1)
        axes.invert_xaxis()
    figure.set_layout_engine("tight")
    figure.draw_without_rendering()
    for axes, (_, _, column) in zip(figure.axes, panels, strict=True):
        _label(axes, [(point[0], 100 * point[1], float(point[column])) for point in points])
    return _svg(figure, "latency", "Prefill and decode latency over block parameters")


def _label(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each point's name above it, higher where another name or point is in the way."""
    to_points = 72 / axes.figure.dpi
    # Centres and least distances, in points: of the dots, and of the names written so far.
    taken = [
        (*axes.transData.transform((x, y)) * to_points, (NAME_WIDTH + DOT) / 2, (NAME_HEIGHT + DOT) / 2)
        for _, x, y in points
    ]
    for name, x, y in sorted(points, key=lambda point: (point[2], point[1])):
        left, bottom = axes.transData.transform((x, y)) * to_points
        rise = 10.0
        while any(abs(left - a) < width and abs(bottom + rise - b) < height for a, b, width, height in taken):
            rise += 2
        taken.append((left, bottom + rise, NAME_WIDTH, NAME_HEIGHT))
        axes.annotate(
            name, (x, y), (0, rise), textcoords="offset points", ha="center", va="center", fontsize=8, color=INK
        )


def _axes(figure: Figure, position: int, x_label: str, y_label: str) -> Axes:
    axes: Axes = figure.add_subplot(position)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _svg(figure: Figure, name: str, title: str) -> str:
    """Return a figure as SVG with the page's colours; ids are distinct per figure and the same in every run."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.set_layout_engine("tight")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1
    )
    text = re.sub(r"(font: [^;\"]*?px )[^;\"]*", rf"\1{FONT.replace(chr(39), '')}", text)
    text = re.sub(r'id="(?![mp][0-9a-f]{10}")', f'id="{name}-', text)
    for drawn, wanted in PAGE_COLOURS.items():
        text = text.replace(drawn, wanted)
    return text
