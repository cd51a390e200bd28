"""Selections by the product's own modifiers, kept in directories beside the results: they take longest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from results import Results
from subjects import Subject

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.modifiers import DepthShrinkingModifier, WidthShrinkingModifier
from amoeba_plugin.modifiers.selection import NO_REPAIR, Selection

REPAIRED, CUT = "least_squares", NO_REPAIR


@dataclass(frozen=True)
class Way:
    """How subnets are chosen and repaired.

    Attributes:
        selector: Of layers; empty: all stay.
        searched: What candidates are repaired by while layers are searched.
        repaired: Whether the depths that were found are.
        width: Fields of ``WidthShrinkingModifier``; ``None``: the whole width stays.
    """

    selector: str = ""
    searched: str = CUT
    repaired: bool = False
    width: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Selected:
    """What a way chose on one draw of calibration rows.

    Attributes:
        strategy: Of the subject's model.
        shapes: By what was asked for, a total, a width or a depth.
        seconds: Of all CPUs.
    """

    strategy: SubnetStrategy = field(repr=False)
    shapes: Mapping[str, str]
    seconds: float

    def elastic(self, subject: Subject) -> ElasticModel:
        """Make a new elastic model of the subject's."""
        return ElasticModel(subject.model(), self.strategy)


def selected(subject: Subject, results: Results, key: str, way: Way, seed: int) -> Selected:
    """Return what a way chooses on the calibration rows that a seed draws; what is kept is not chosen again."""
    directory = results.directory(key)
    about = results.of(key, lambda: _select(subject, way, seed, directory))
    return Selected(SubnetStrategy.load(directory), about["shapes"], about["seconds"])


def _select(subject: Subject, way: Way, seed: int, directory: Any) -> dict[str, Any]:
    before = time.process_time()
    model, batches = subject.model(), subject.drawn(seed)
    adapter = architecture_for(model.config.model_type)
    selection = Selection(None, adapter, model_fingerprint(model, adapter), batches, ExitStack())  # type: ignore[arg-type]
    _, *depths = subject.depths
    if way.selector:
        modifier = DepthShrinkingModifier(
            min_depth=depths[-1], selector=way.selector, repair=way.searched,
            max_batches=None if way.searched == REPAIRED else 1,  # as much text judges
        )  # fmt: skip
        selection.depth, selection.depth_repair = modifier._searched(selection, model), way.repaired
        if way.width is None:
            selection.depth = selection.depth.only(depths)
    shapes = {str(depth): f"{depth}x1" for depth in depths}
    if way.width is not None:
        widening = WidthShrinkingModifier(**{"round_to": subject.round_to} | way.width)
        widening._take(widening._ranked(model, selection), selection)
        totals = {str(total): str(shape) for total, shape in selection.totals.items()}
        shapes = totals or {width: f"{subject.depths[0]}x{width}" for width in widening.widths if width != "1"}
    elastic = selection.require_elastic(model)
    elastic.strategy.save(directory)
    return {"shapes": shapes, "seconds": time.process_time() - before}
