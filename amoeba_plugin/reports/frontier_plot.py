"""What a search found as a picture: quality over every cost of the budget, schemes by colour; the paper's Figure 3."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from amoeba_plugin.deployment.budget import Budget, Limit
from amoeba_plugin.deployment.search.frontier import Candidate, Frontier
from amoeba_plugin.reports.picture import FAINT, INK, PAPER

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by all eyes (Okabe, Ito)
BUDGET = "#8a8a8a"
NAMED = 8  # shapes that are named in a panel, of those that none is better than at no more cost


def drawn(found: Frontier) -> Figure:
    """Draw what a search found, a panel for every limit of its budget; bars are the intervals of costs, and of the
    difference from the choice, for the text that all are judged on varies more than they do."""
    limits = Budget.parse(found.budget).limits
    figure = Figure(figsize=(1.5 + 4.6 * len(limits), 4.4))
    for place, limit in enumerate(limits, 1):
        axes: Axes = figure.add_subplot(1, len(limits), place)
        _draw(axes, found, limit)
        if place == 1:
            axes.set_ylabel(f"{found.evaluator}, {found.unit}", color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside lower center", labelcolor=INK)
    title = (
        f"{found.chosen} at {found.flow} within {found.budget}\n95 % intervals: of costs, and of the difference from it"
    )
    figure.suptitle(title, fontsize=10, color=INK)
    figure.set_layout_engine("constrained")
    return figure


def _draw(axes: Axes, found: Frontier, limit: Limit) -> None:
    name, unit = limit.unit
    flows = [str(point) for point in Budget.parse(found.budget).points]
    for flow, colour in zip(flows, COLOURS * len(flows), strict=False):
        _scatter(axes, found, flow, limit, colour)
    left, right = axes.get_xlim()
    most = limit.most / unit
    right = max(right, most + 0.03 * (right - left))
    axes.axvspan(most, right, color=BUDGET, alpha=0.12, linewidth=0)
    axes.axvline(most, color=BUDGET, linestyle="--", linewidth=1.2, label="budget")
    axes.set_xlim(left, right)
    best = found.best
    axes.scatter(
        [best.costs[limit.name].value / unit], [best.quality.value], s=190, facecolors="none", edgecolors=INK,
        linewidths=1.6, zorder=5, label="chosen",
    )  # fmt: skip
    edge = [each for each in found.candidates if not each.dominated and each != best]
    for each in [best, *edge[:: max(1, math.ceil(len(edge) / NAMED))]]:
        axes.annotate(
            each.shape, (each.costs[limit.name].value / unit, each.quality.value), (0, 11), ha="center", fontsize=8,
            textcoords="offset points", color=INK, fontweight="bold" if each == best else "normal", zorder=6,
            bbox={"boxstyle": "round,pad=0.05", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.6},
        )  # fmt: skip
    axes.set_xlabel(f"{limit.name}, {name}", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _scatter(axes: Axes, found: Frontier, flow: str, limit: Limit, colour: str) -> None:
    """Draw the choices of one flow; intervals of those alone that none is better than at no more cost."""
    candidates, unit = [each for each in found.candidates if each.flow == flow], limit.unit[1]
    costs = [each.costs[limit.name].value / unit for each in candidates]
    values = [each.quality.value for each in candidates]
    shades = [to_rgba(colour, 0.3 if each.dominated else 1.0) for each in candidates]
    axes.scatter(costs, values, s=26, color=shades, linewidths=0, zorder=3)
    axes.scatter([], [], s=26, color=colour, linewidths=0, label=flow)
    for each, cost, value in zip(candidates, costs, values, strict=True):
        if not each.dominated:
            of, below, above = each.costs[limit.name], *_ends(each, found)
            across = [[_finite(cost - of.low / unit)], [_finite(of.high / unit - cost)]]
            axes.errorbar(cost, value, [[below], [above]], across, color=colour, alpha=0.45, linewidth=1, zorder=2)


def _ends(each: Candidate, found: Frontier) -> tuple[float, float]:
    """Return how far the difference from the choice reaches, down and up."""
    low, high = _finite(each.behind.value - each.behind.low), _finite(each.behind.high - each.behind.value)
    return (high, low) if found.larger_is_better else (low, high)


def _finite(length: float) -> float:
    """Return the length of an interval's half; of one without an end, none."""
    return max(length, 0.0) if math.isfinite(length) else 0.0
