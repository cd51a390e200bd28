"""The table about repair: what widths lose as they are cut, with compensating biases, and repaired by least squares."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from results import Losses, Results, above, header, row
from subjects import Subject

from amoeba_plugin.elastic.repairs import Repairs
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.modifiers import WidthShrinkingModifier
from amoeba_plugin.modifiers.selection import Selection
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import repair_named
from amoeba_plugin.selection.repair.width import repair_shapes
from training import Space, measure

WAYS: Mapping[str, Mapping[str, Any]] = {
    "as cut": {"repair": "none"},
    "mean of what is missing as bias": {"bias_compensation": True},
    "least squares, every linear for itself": {"repair": "local_least_squares"},
    "least squares, all of what was lost made up for": {"repair": "least_squares", "catches_up": 1.0},
    "least squares": {"repair": "least_squares"},
}


def table_repair(subject: Subject, results: Results, *_: object) -> None:
    """Losses of every width and text before any training; CPU seconds to choose and repair, and MB of weights."""
    shapes = [f"{subject.depths[0]}x{width}" for width in subject.widths[:3]]
    columns = [f"{shape}, {text}" for text in subject.reports for shape in shapes[1:]]
    title = f"Channels that are gone, and what makes up for them, before training ({subject.path.name})"
    print(header(title, "importance, way", [*columns, "CPU s", "MB"]))
    for importance in ("flap", "obs"):
        for way, fields in WAYS.items():
            key = f"repair/{importance}/{way}"
            found = results.of(key, lambda i=importance, f=fields: dict(_measured(subject, shapes, i, f)))
            cells = [
                above([found[f"{text} {shape}"]], found[f"{text} {shapes[0]}"])
                for text in subject.reports
                for shape in shapes[1:]
            ]
            cells += [f"{found['seconds']:.0f}", f"{found['bytes'] / 1e6:.1f}"]
            print(row(f"{importance}, {way}", cells), flush=True)


def _measured(
    subject: Subject, shapes: list[str], importance: str, fields: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    model, widths = subject.model(), subject.widths[:3]
    modifier = WidthShrinkingModifier(
        widths=[str(width) for width in widths], importance=importance, allocation=subject.allocation,
        round_to=subject.round_to, **{name: each for name, each in fields.items() if name != "catches_up"},
    )  # fmt: skip
    before = time.process_time()
    batches = subject.calibrations[subject.own_text]
    adapter, repairs = architecture_for(model.config.model_type), Repairs()
    selection = Selection(None, adapter, model_fingerprint(model, adapter), batches, ExitStack())  # type: ignore[arg-type]
    width = modifier._ranked(model, selection).width
    if modifier.repair != "none":
        repair = repair_named(modifier.repair)
        repair = replace(repair, catches_up=fields.get("catches_up", repair.catches_up))
        repairs = repair_shapes(LayerRuns.of(model, adapter, batches), width, repair)
    yield "seconds", time.process_time() - before
    yield "bytes", repairs.bytes
    layers = subject.depths[0]
    elastic = Space(DepthStrategy.whole(layers), width, (layers,), widths, repairs).elastic(subject)
    for text, held_out in subject.reports.items():
        losses: Losses = measure(elastic, shapes, held_out)
        yield from ((f"{text} {shape}", loss) for shape, loss in losses.items())
