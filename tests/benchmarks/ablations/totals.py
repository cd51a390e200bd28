"""The table about totals: the best subnets of a share of the blocks, as several selections choose and repair them.

Nothing is trained. Perplexities are of texts that nothing was chosen on; the results keep the loss of every row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from results import Results, header, row
from subjects import Subject

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.modifiers import DepthShrinkingModifier, WidthShrinkingModifier
from amoeba_plugin.modifiers.selection import NO_REPAIR, Selection
from amoeba_plugin.selection.objectives import PerTokenLoss

TOTALS = ["4/5", "13/20", "1/2"]


Fields = Mapping[str, Any]
REPAIRED, CUT = "least_squares", "none"
# by name: the selector of layers, what they are searched and repaired by, and fields of the width modifier
SELECTIONS: Mapping[str, tuple[str, str, str, Fields]] = {
    "all layers, as cut": ("", CUT, CUT, {"repair": CUT}),
    "all layers, biases": ("", CUT, CUT, {"bias_compensation": True}),
    "all layers, repaired": ("", CUT, CUT, {}),
    "all layers, repaired, obs": ("", CUT, CUT, {"importance": "obs"}),
    "lazy greedy as cut, then repaired": ("lazy_greedy", CUT, REPAIRED, {}),
    "lazy greedy, searched repaired": ("lazy_greedy", REPAIRED, REPAIRED, {}),
    "lazy greedy, searched repaired, obs": ("lazy_greedy", REPAIRED, REPAIRED, {"importance": "obs"}),
    "auto, searched repaired, obs": ("auto", REPAIRED, REPAIRED, {"importance": "obs"}),
}
DEPTHS: Mapping[str, tuple[str, str, str]] = {
    "program (paper), as cut": ("dynamic_program", CUT, CUT),
    "lazy greedy, as cut": ("lazy_greedy", CUT, CUT),
    "lazy greedy as cut, then repaired": ("lazy_greedy", CUT, REPAIRED),
    "lazy greedy, searched repaired": ("lazy_greedy", REPAIRED, REPAIRED),
    "auto, searched repaired": ("auto", REPAIRED, REPAIRED),
}


def table_totals(subject: Subject, results: Results, _: Sequence[int] = (), only: Sequence[str] | None = None) -> None:
    """Perplexity of the best shape of every total, by selection; and how much of the loss that selection takes away."""
    columns = [f"{total}, {text}" for text in subject.reports for total in TOTALS]
    title = f"The best subnets of a share of the blocks, nothing trained ({subject.path.name})"
    print(header(title, "selection", [*columns, "shapes", "CPU s"]))
    for name, (selector, searched, repaired, width) in SELECTIONS.items():
        if only and not any(part in name for part in only):
            continue
        asked = {"totals": TOTALS, "round_to": subject.round_to, **width}
        if "bias_compensation" in width:  # which totals do not measure
            asked = {"widths": ["1", *TOTALS], "round_to": subject.round_to, **width}
        found = results.of(
            f"totals/{name}", lambda s=(selector, searched, repaired), w=asked: dict(_measured(subject, *s, w))
        )
        _print(subject, name, found, TOTALS)


def table_depths(subject: Subject, results: Results, _: Sequence[int] = (), only: Sequence[str] | None = None) -> None:
    """Perplexity of two depths at the whole width, by selection."""
    depths = [str(depth) for depth in subject.depths[1:]]
    columns = [f"{depth} layers, {text}" for text in subject.reports for depth in depths]
    title = f"Layers that are gone, nothing trained ({subject.path.name})"
    print(header(title, "selection", [*columns, "shapes", "CPU s"]))
    for name, way in DEPTHS.items():
        if only and not any(part in name for part in only):
            continue
        found = results.of(f"depths/{name}", lambda w=way: dict(_measured(subject, *w, None)))
        _print(subject, name, found, depths)


def _measured(
    subject: Subject, selector: str, searched: str, repaired: str, width: Fields | None
) -> Iterator[tuple[str, Any]]:
    """Yield the loss of every row of every text at every shape, by text and what was asked for; and the seconds."""
    before = time.process_time()
    elastic, shapes = _selected(subject, selector, searched, repaired, width)
    yield "seconds", time.process_time() - before
    for asked, shape in shapes.items():
        yield f"shape {asked}", shape
        with elastic.active(shape) as model, torch.no_grad():
            for text, batches in subject.reports.items():
                rows = torch.cat([PerTokenLoss().observe(model.eval(), batch) for batch in batches])
                yield f"{text} {asked}", (rows[:, 0] / rows[:, 1]).tolist()


def _selected(
    subject: Subject, selector: str, searched: str, repaired: str, width: Fields | None
) -> tuple[ElasticModel, dict[str, str]]:
    model = subject.model()
    adapter = architecture_for(model.config.model_type)
    batches = subject.calibrations[subject.own_text]
    selection = Selection(None, adapter, model_fingerprint(model, adapter), batches, ExitStack())  # type: ignore[arg-type]
    layers, *depths = subject.depths
    if selector:
        modifier = DepthShrinkingModifier(
            min_depth=depths[-1], selector=selector, repair=searched, max_batches=None if searched == REPAIRED else 1
        )  # as much text judges
        selection.depth, selection.depth_repair = modifier._searched(selection, model), repaired != NO_REPAIR
        if width is None:
            selection.depth = selection.depth.only(depths)
    shapes = {str(depth): f"{depth}x1" for depth in depths}
    if width is not None:
        widening = WidthShrinkingModifier(**width)
        selection.width, selection.width_repair = widening._ranked(model, selection), widening.repair
        totals = {str(total): str(shape) for total, shape in selection.totals.items()}
        shapes = totals or {total: f"{layers}x{total}" for total in TOTALS}
    return selection.require_elastic(model), shapes


def _print(subject: Subject, name: str, found: Mapping[str, Any], asked: Sequence[str]) -> None:
    cells = [f"{math.exp(statistics.mean(found[f'{text} {each}'])):.1f}" for text in subject.reports for each in asked]
    print(
        row(name, [*cells, ", ".join(found[f"shape {each}"] for each in asked), f"{found['seconds']:.0f}"]), flush=True
    )
