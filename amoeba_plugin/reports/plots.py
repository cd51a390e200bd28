"""Plots of a report: what shapes lose, and how long they take."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amoeba_plugin.reports.picture import AFTER, BEFORE, FAINT, INK

NAME_WIDTH, NAME_HEIGHT = 34, 10  # of a shape's name in a plot, in points
DOT = 7  # across, in points


def gap_plot(points: Sequence[tuple[str, float, float, float | None]]) -> Figure:
    """Draw the loss gap to the dense model over block parameters, before and after one-for-all training.

    Args:
        points: (shape, share of block parameters, gap before, gap after or ``None``), gaps in nats per token.
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
    return figure


def latency_plot(points: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Draw measured latency, prefill and decoding side by side and from zero, over block parameters.

    Args:
        points: (name, share of block parameters, prefill in ms, decode in ms per token).
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
    return figure


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
