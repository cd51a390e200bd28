"""A profile as a picture: relative time over depth and width, flow by flow; the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.table import disagreements, rows
from amoeba_plugin.reports.picture import INK
from amoeba_plugin.shape import SubnetShape

MARK, DARK, LIGHT_INK = "#d55e00", "#111111", "#fdfdfd"
LIGHT = 0.85  # share of the whole model's time: below it, dark ink can be read


def drawn(profile: Profile) -> Figure:
    """Draw what share of the whole model's time every shape takes: a row for every flow, of prefill and of decoding.

    Shapes that were measured have their figure in bold; those that two flows or phases rank the other way round, beyond
    their intervals, have a frame.
    """
    odd = {shape for pair in disagreements(profile) for shape in (pair[1], pair[3])}
    shapes = {name: SubnetShape.parse(name) for name in profile.sizes}
    depths = sorted({shape.depth for shape in shapes.values()}, reverse=True)
    widths = sorted({shape.width for shape in shapes.values()}, reverse=True)
    figure = Figure(figsize=(2 + 2 * (0.62 * len(widths) + 1), (0.32 * len(depths) + 1.1) * len(profile.flows) + 0.5))
    for place, flow in enumerate(profile.flows):
        found = rows(profile, flow)
        longest = max(found[0].prefill)
        phases = {f"prefill[{longest}]": {row.shape: row.prefill[longest] for row in found}}
        phases["decode"] = {row.shape: row.decode for row in found}
        for column, (phase, costs) in enumerate(phases.items(), 1):
            axes: Axes = figure.add_subplot(len(profile.flows), 2, 2 * place + column)
            axes.set_title(f"{flow} {phase}", fontsize=9, color=INK)
            places = {name: (depths.index(shape.depth), widths.index(shape.width)) for name, shape in shapes.items()}
            _heat(axes, costs, places, odd)
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
            axes.set_xticks(range(len(widths)), list(map(str, widths)), fontsize=8)
            axes.set_xlabel("width", fontsize=8, color=INK)
            axes.set_ylabel("depth", fontsize=8, color=INK)
    notes = "% of the whole model's time; bold: measured" + (
        "; framed: ranked the other way round elsewhere" * bool(odd)
    )
    figure.suptitle(f"{profile.model}\n{notes}", fontsize=10, color=INK, parse_math=False)
    figure.set_layout_engine("constrained")
    return figure


def _heat(axes: Axes, costs: Mapping[str, Prediction], places: Mapping[str, Sequence[int]], framed: set[str]) -> None:
    """Draw one flow and phase."""
    largest = next(iter(costs.values())).value
    grid = np.full([max(of) + 1 for of in zip(*places.values(), strict=True)], np.nan)
    for name, cost in costs.items():
        grid[tuple(places[name])] = cost.value / largest
    rows_at, columns_at = (np.arange(count + 1) - 0.5 for count in grid.shape)
    axes.pcolormesh(columns_at, rows_at, grid, cmap="Blues", vmin=0, vmax=1.35)
    axes.invert_yaxis()
    for name, cost in costs.items():
        row, column = places[name]
        share = cost.value / largest
        axes.text(
            column, row, f"{share:.0%}", ha="center", va="center", fontsize=8,
            color=DARK if share < LIGHT else LIGHT_INK, fontweight="bold" if cost.measured else "normal",
        )  # fmt: skip
        if name in framed:
            axes.add_patch(
                Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=MARK, linewidth=1.6)
            )
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
