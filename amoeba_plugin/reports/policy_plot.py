"""A layer-wise policy as a picture: bits, and sparsity where there is any, of every unit of every layer."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amoeba_plugin.reports.picture import INK
from amoeba_plugin.selection.layerwise.options import WHOLE
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy, UnitPolicy

DARK, LIGHT = "#111111", "#fdfdfd"
COLOURS, DARKEST = "Blues", 1.2  # a cell of 16 bits is a shade below the darkest
LETTER = 6.5  # points
FEW = 16  # layers that all have their number below


def drawn(policy: LayerwisePolicy) -> Figure:
    """Draw a column for every layer and a row for every kind of unit, in the order that a token meets them."""
    rows: list[str] = []
    cells: dict[tuple[int, int], UnitPolicy] = {}
    for name, unit in policy.units.items():
        layer, _, kind = name.partition(".")
        rows += [] if kind in rows else [kind]
        cells[rows.index(kind), int(layer)] = unit
    layers = 1 + max(column for _, column in cells)
    figure = Figure(figsize=(max(5.5, 1.6 + 0.26 * layers), 1.2 + 0.3 * len(rows)))
    axes: Axes = figure.add_subplot()
    grid = np.full((len(rows), layers), np.nan)
    for place, unit in cells.items():
        grid[place] = np.log2(unit.bits) * (1 - unit.sparsity)
    edges = (np.arange(count + 1) - 0.5 for count in (layers, len(rows)))
    axes.pcolormesh(*edges, grid, cmap=COLOURS, vmin=0, vmax=DARKEST * np.log2(WHOLE))
    axes.invert_yaxis()
    for (row, column), unit in cells.items():
        zeros = f"\n{unit.sparsity:.0%}" if unit.sparsity else ""
        dark = grid[row, column] < 0.75 * np.log2(WHOLE)
        axes.text(
            column, row, f"{unit.bits}{zeros}", ha="center", va="center", fontsize=LETTER, color=DARK if dark else LIGHT
        )
    axes.set_yticks(range(len(rows)), [_shortened(kind) for kind in rows], fontsize=8)
    numbered = range(0, layers, 1 if layers <= FEW else 5)
    axes.set_xticks(numbered, list(map(str, numbered)), fontsize=8)
    axes.set_xlabel("layer", fontsize=8, color=INK)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    pruned = any(unit.sparsity for unit in policy.units.values())
    shown = "bits of a weight, and the share of them that is zero" if pruned else "bits of a weight"
    figure.suptitle(f"{shown}\n{policy.in_words}", fontsize=9, color=INK, parse_math=False)
    figure.set_layout_engine("constrained")
    return figure


def _shortened(kind: str) -> str:
    """Return what a unit's linears are called, short.

    >>> _shortened("q_proj+k_proj+v_proj")
    'q, k, v'
    """
    return ", ".join(part.rpartition(".")[2].removesuffix("_proj") for part in kind.split("+"))
