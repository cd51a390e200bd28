"""Sizes that are the same in every layer but anchors, as the calibration data wants them: of a width, and of a total.

Scores order the units within a group well, and say little about what a head is worth in neurons. So every split that
keeps the share of parameters asked for, and that a stock class can hold, is tried, and the best taken. For a share of
the whole model, depth and width together, splits are tried at several depths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.selection.in_order import in_order
from amoeba_plugin.selection.objectives import Objective, Score, sort_key
from amoeba_plugin.selection.over_ranks import score_over_ranks, share_of
from amoeba_plugin.selection.width.allocation import other_share, tell_equal
from amoeba_plugin.selection.width.ranking import rank_widths, require_widths
from amoeba_plugin.selection.width.splits import Part, class_finder, parts_of, splits, spread
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.selection.width.trials import Sizes, Trial, Trials
from amoeba_plugin.shape import SubnetShape, half_steps

logger = logging.getLogger(__name__)
COARSE = 6  # depths that a total is tried at first; then those beside the best
FEW = 3  # splits tried at each of them; all of them at the best

Measure = Callable[[Sequence[Trial]], list[Score]]


@dataclass
class Choice:
    """What was measured and taken so far.

    Attributes:
        parts: Of the model.
        possible: Tells which sizes a stock class holds.
        measure: Scores shapes.
        objective: Says which score is better.
        layers: How many the model has.
        anchors: Those that keep everything; the others make up for them.
        sizes: Taken, by width; nested.
    """

    parts: Sequence[Part]
    possible: Callable[[Sizes], bool]
    measure: Measure
    objective: Objective
    layers: int
    anchors: frozenset[int] = frozenset()
    sizes: dict[Fraction, Sizes] = field(default_factory=dict)

    def splits(self, share: Fraction) -> list[Sizes]:
        """Return the splits of a share between the next wider and the next narrower width that were taken."""
        if share in self.sizes:
            return [self.sizes[share]]
        wider, narrower = (
            [other for other in self.sizes if other > share], [other for other in self.sizes if other < share],
        )  # fmt: skip
        most = self.sizes[min(wider)] if wider else {part.name: part.units for part in self.parts}
        least = self.sizes[max(narrower)] if narrower else {}
        own = other_share(share, Fraction(len(self.anchors), self.layers))
        return splits(self.parts, own, most, self.possible, least)

    def take_width(self, share: Fraction) -> None:
        """Take the best split of a width."""
        tried = self.splits(share)
        scores = self.measure([Trial(sizes, None, self.anchors) for sizes in tried]) if len(tried) > 1 else []
        best = self._best(scores) if scores else 0
        self.sizes[share] = tried[best]
        if share != 1:
            value = f": loss {scores[best].value:.4g}, the best of {len(tried)} splits" if scores else ""
            where = "every layer but the anchors" if self.anchors else "every layer"
            logger.info("width %s keeps %s in %s%s", share, self._words(tried[best]), where, value)

    def take_total(self, total: Fraction, shares: Mapping[float, Fraction]) -> SubnetShape:
        """Take the best depth, and the best split there, of a share of the whole model.

        Args:
            total: The share.
            shares: By depth, the width at which it has that share; widths above 1 are too shallow depths.

        Raises:
            RecipeError: If no depth has it.
        """
        depths = sorted(depth for depth, share in shares.items() if share <= 1)
        if not depths:
            raise RecipeError(
                f"total {total} is impossible: the deepest subnet has {max(shares):g} layers; take less than "
                f"{total * max(shares.values())}"
            )
        tried = {depth: spread(self.splits(shares[depth]), FEW) for depth in spread(depths, COARSE)}
        known = self._measured(tried, {})
        at = depths.index(self._best_of(known)[0])
        beside = {depth: spread(self.splits(shares[depth]), FEW) for depth in depths[max(at - 1, 0) : at + 2]}
        known = self._measured(beside, known)
        depth = self._best_of(known)[0]
        known = self._measured({depth: self.splits(shares[depth])}, known)
        depth, number = self._best_of(known)
        share = shares[depth]
        self.sizes[share], score = known[depth][number]
        shape = SubnetShape(half_steps(depth), share)
        count = sum(len(each) for each in known.values())
        logger.info(
            "total %s is shape %s, with %s in every layer: loss %.4g, the best of %d shapes",
            total, shape, self._words(self.sizes[share]), score.value, count,
        )  # fmt: skip
        return shape

    def _measured(
        self, tried: Mapping[float, Sequence[Sizes]], known: Mapping[float, Sequence[tuple[Sizes, Score]]]
    ) -> dict[float, list[tuple[Sizes, Score]]]:
        """Return what is known with what it takes to know more; what is known is not measured again."""
        found = {depth: list(each) for depth, each in known.items()}
        missing = [
            Trial(sizes, depth)
            for depth, several in tried.items()
            for sizes in several
            if sizes not in [each for each, _ in found.get(depth, [])]
        ]
        for trial, score in zip(missing, self.measure(missing) if missing else [], strict=True):
            assert trial.depth is not None
            found.setdefault(trial.depth, []).append((trial.sizes, score))
        return found

    def _best_of(self, known: Mapping[float, Sequence[tuple[Sizes, Score]]]) -> tuple[float, int]:
        """Return depth and number of what is best; of equal ones the deepest."""
        flat = [(depth, number) for depth in sorted(known, reverse=True) for number in range(len(known[depth]))]
        return flat[self._best([known[depth][number][1] for depth, number in flat])]

    def _best(self, scores: Sequence[Score]) -> int:
        return min(range(len(scores)), key=lambda index: sort_key(self.objective, scores[index]))

    def _words(self, sizes: Sizes) -> str:
        return ", ".join(f"{sizes[part.name]} of {part.units} {part.name} units" for part in self.parts)


def measured_widths(
    task: WidthTask,
    objective: Objective,
    batches: Sequence[Batch],
    progress: bool = True,
    trials: Trials | None = None,
) -> tuple[WidthStrategy, dict[Fraction, SubnetShape]]:
    """Give every width, and every total, the sizes that are best of those with its share of the parameters.

    Every width keeps subsets of what the wider ones keep, and sizes that a stock class can hold where there are any.
    Biases that stand in for missing channels are not measured.

    Args:
        task: Its widths are shares of the parameters of all units, its totals of those of all units of all layers;
            with anchors there are no totals.
        objective: Measured on the model at every split; the best one is kept.
        batches: Calibration data; ranks that were given the same share them out.
        progress: Show a progress bar over the widths.
        trials: Measures every split with what a repair makes of it; ``None``: as it is cut, totals at all layers.

    Returns:
        The strategy, widths largest first, and the shape that is best of every total.

    Raises:
        RecipeError: If a width, a total, a rounding or the anchors are impossible.
        DataError: If statistics or batches lack what is needed, or scores are not finite.
        ArchitectureError: If the model cannot be made elastic, as when accelerate offloads weights of it.
    """
    model, adapter, anchors = task.model, task.adapter, frozenset(task.anchors)
    ranked = rank_widths(replace(task, widths=[Fraction(1)], totals=(), allocation="uniform"))
    objective.check(batches)
    mine, _ = share_of(objective, batches)
    widths, layers = require_widths(task.widths), len(adapter.layers(model))
    depths = (trials.kept if trials is not None else {}) or {layers: range(layers)}
    bar: Any = StageBar(
        total=layers * (len(widths) + 3 * len(task.totals)), desc="sizes of widths", unit="layer",
        disable=not progress, shorter=LESS_DATA,
    )  # fmt: skip
    with in_order(model, adapter, ranked) as elastic, bar:

        def measure(tried: Sequence[Trial]) -> list[Score]:
            if trials is not None:
                return trials.scores(elastic, tried, bar.update)
            return [_as_cut(elastic, trial, objective, mine) for trial in tried]

        parts = parts_of(model, adapter, task.round_to)
        has_class = _any if anchors else class_finder(model.config, adapter, task.bias_compensation)
        choice = Choice(parts, has_class, measure, objective, layers, anchors)
        for number, share in enumerate(widths, 1):
            choice.take_width(share)
            bar.update(layers * number - bar.n)
        shapes = {
            total: choice.take_total(total, {depth: total * layers / Fraction(depth) for depth in depths})
            for total in sorted(task.totals, reverse=True)
        }
        bar.update(bar.total - bar.n)
    groups = adapter.channel_groups(model.config)
    units = {
        share: {
            group_key(index, group): group.units if index in anchors else sizes[group.name]
            for index in range(layers)
            for group in groups
        }
        for share, sizes in sorted(choice.sizes.items(), reverse=True)
    }
    tell_equal(units)
    return replace(ranked, units=units, allocation="measured"), shapes


def _as_cut(elastic: ElasticModel, trial: Trial, objective: Objective, batches: Sequence[Batch]) -> Score:
    for index in range(len(elastic.layers)):
        elastic.set_layer_units(index, trial.keyed(index, elastic.adapter.channel_groups(elastic.config)))
    return score_over_ranks(objective, elastic.model, batches)


def _any(sizes: Sizes) -> bool:
    """Layers that differ have a class of their own, whatever their sizes."""
    return True
