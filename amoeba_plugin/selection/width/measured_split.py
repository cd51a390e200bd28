"""Sizes that are the same in every layer, split between attention and MLP as the calibration data wants it.

Scores order the units within a group well, and say little about what a head is worth in neurons. So every split that
keeps the share of parameters asked for, and that a stock class can hold, is tried, and the best taken.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.elastic.group import consumer_weight
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup, group_key
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.selection.in_order import in_order
from amoeba_plugin.selection.objectives import Objective, Score, sort_key
from amoeba_plugin.selection.over_ranks import score_over_ranks, share_of
from amoeba_plugin.selection.repair.width import WidthRepair
from amoeba_plugin.selection.width.allocation import rounding_steps, tell_equal
from amoeba_plugin.selection.width.ranking import rank_widths, require_widths, unit_cost
from amoeba_plugin.selection.width.task import WidthTask

logger = logging.getLogger(__name__)
MOST_SPLITS = 16  # tried per width; of more, as many at even distances
Sizes = Mapping[str, int]  # units by part


@dataclass(frozen=True)
class Part:
    """What has one size in a whole model: the heads, or the neurons of all experts."""

    name: str  # of its groups: "attention", "mlp"
    units: int
    step: int  # sizes are multiples of it, or the whole
    cost: int  # parameters of one unit, of all groups

    def sizes(self, most: int) -> list[int]:
        """Return the possible sizes up to one, largest first."""
        multiples = range(self.step, min(self.units, most) + 1, self.step)
        return sorted({*multiples, *([self.units] if most == self.units else [])}, reverse=True)


def measured_widths(
    task: WidthTask,
    objective: Objective,
    batches: Sequence[Batch],
    progress: bool = True,
    repair: WidthRepair | None = None,
) -> WidthStrategy:
    """Give every width the sizes, the same in all layers, that are best of those with its share of the parameters.

    Every width keeps subsets of what the wider ones keep, and sizes that a stock class can hold where there are any.
    Biases that stand in for missing channels are not measured.

    Args:
        task: Its widths are shares of the parameters of all units.
        objective: Measured on the model at every split; the best one is kept.
        batches: Calibration data; ranks that were given the same share them out.
        progress: Show a progress bar over the widths.
        repair: Every split is measured with what this makes of it; ``None``: as it is cut.

    Returns:
        The strategy, widths largest first.

    Raises:
        RecipeError: If a width or a rounding is impossible.
        DataError: If statistics or batches lack what is needed, or scores are not finite.
        ArchitectureError: If the model cannot be made elastic, as when accelerate offloads weights of it.
    """
    model, adapter = task.model, task.adapter
    ranked = rank_widths(replace(task, widths=[Fraction(1)], allocation="uniform", anchors=()))
    objective.check(batches)
    mine, _ = share_of(objective, batches)
    parts = parts_of(model, adapter, task.round_to)
    has_class = _class_finder(model.config, adapter, task.bias_compensation)
    chosen: dict[Fraction, Sizes] = {}
    most: Sizes = {part.name: part.units for part in parts}
    shares = require_widths(task.widths)
    bar: Any = StageBar(
        total=MOST_SPLITS * len(shares), desc="sizes of widths", unit="split", disable=not progress, shorter=LESS_DATA
    )
    with in_order(model, adapter, ranked) as elastic, bar:
        for share in shares:
            tried = splits(parts, share, most, has_class)
            bar.total -= MOST_SPLITS - (len(tried) if len(tried) > 1 else 0)
            scores: list[Score] = []
            for sizes in tried if len(tried) > 1 else []:
                elastic.set_units(sizes, None if repair is None else _repaired(elastic, sizes, repair))
                scores.append(score_over_ranks(objective, model, mine))
                bar.update()
            most = chosen[share] = _best(objective, tried, scores) if scores else tried[0]
            if share != 1:
                _tell(share, parts, tried, scores, most)
    groups = adapter.channel_groups(model.config)
    keys = {group_key(index, group): group.name for index in range(len(adapter.layers(model))) for group in groups}
    units = {share: {key: sizes[name] for key, name in keys.items()} for share, sizes in chosen.items()}
    tell_equal(units)
    return replace(ranked, units=units, allocation="measured")


def parts_of(model: PreTrainedModel, adapter: ArchitectureAdapter, round_to: Mapping[str, int] | int) -> list[Part]:
    """Return the parts of a model, the one with the finest sizes last.

    Raises:
        RecipeError: If a rounding is impossible.
    """
    groups, layer = adapter.channel_groups(model.config), adapter.layers(model)[0]
    steps = rounding_steps(groups, round_to)
    by_name: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        by_name.setdefault(group.name, []).append(group)
    parts = [
        Part(name, same[0].units, steps[name], sum(unit_cost(layer, each) for each in same))
        for name, same in by_name.items()
    ]
    return sorted(parts, key=lambda part: part.cost * part.step, reverse=True)


def splits(
    parts: Sequence[Part], share: Fraction, most: Sizes, possible: Callable[[Sizes], bool] = lambda _: True
) -> list[Sizes]:
    """Return the sizes of parts whose parameters are nearest to a share of all, up to ``MOST_SPLITS`` of them.

    Args:
        parts: The one with the finest sizes last: it makes up for what the others keep.
        share: Of the parameters of all parts.
        most: Sizes of the next wider width.
        possible: Tells which sizes to take where there is a choice.

    Returns:
        All that lie within half a step of the finest part; where none does, the nearest. Of share 1 the whole.
    """
    if share == 1:  # a whole that is no multiple of its step may have a neighbour within half a step
        return [{part.name: part.units for part in parts}]
    *others, last = parts
    target = share * sum(part.cost * part.units for part in parts)
    found: list[tuple[Fraction, Sizes]] = []
    for sizes in itertools.product(*(part.sizes(most[part.name]) for part in others)):
        left = target - sum(part.cost * size for part, size in zip(others, sizes, strict=True))
        size = min(last.sizes(most[last.name]), key=lambda size: abs(size * last.cost - left))
        names = (part.name for part in parts)
        found.append((abs(size * last.cost - left), dict(zip(names, (*sizes, size), strict=True))))
    found = [each for each in found if possible(each[1])] or found
    allowed = max(Fraction(last.step * last.cost, 2), min(distance for distance, _ in found))
    near = [sizes for distance, sizes in found if distance <= allowed]
    few = min(len(near), MOST_SPLITS)
    return [near[index * (len(near) - 1) // max(few - 1, 1)] for index in range(few)]


def _class_finder(
    config: PretrainedConfig, adapter: ArchitectureAdapter, bias_compensation: bool
) -> Callable[[Sizes], bool]:
    """Return a function that tells whether a stock class holds sizes: of some, heads must divide the hidden size."""

    def has_class(sizes: Sizes) -> bool:
        biased = frozenset(sizes) if bias_compensation else frozenset()
        try:
            adapter.subnet_config(config, range(config.num_hidden_layers), sizes, biased)
        except ArchitectureError:
            return False
        return True

    return has_class


def _repaired(elastic: ElasticModel, sizes: Sizes, repair: WidthRepair) -> dict[str, Tensor]:
    """Return the consumers' weights, by group key, that a split is repaired with."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(elastic.layers):
        for group in elastic.adapter.channel_groups(elastic.config):
            key, units = group_key(index, group), sizes[group.name]
            weight, order = consumer_weight(layer, group), elastic.strategy.width.order[key]
            for each in repair.columns(key, group, weight, order, [units]).values():
                found[key] = each
    return found


def _best(objective: Objective, tried: Sequence[Sizes], scores: Sequence[Score]) -> Sizes:
    return tried[min(range(len(scores)), key=lambda index: sort_key(objective, scores[index]))]


def _tell(share: Fraction, parts: Sequence[Part], tried: Sequence[Sizes], scores: Sequence[Score], best: Sizes) -> None:
    kept = ", ".join(f"{best[part.name]} of {part.units} {part.name} units" for part in parts)
    values = f": loss {scores[tried.index(best)].value:.4g}, the best of {len(tried)} splits" if scores else ""
    logger.info("width %s keeps %s in every layer%s", share, kept, values)
