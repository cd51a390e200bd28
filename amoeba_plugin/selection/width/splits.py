"""Sizes that are the same in every layer: the ways to split a share of the parameters between attention and MLP."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup
from amoeba_plugin.selection.width.allocation import rounding_steps
from amoeba_plugin.selection.width.ranking import unit_cost
from amoeba_plugin.selection.width.trials import Sizes

MOST_SPLITS = 16  # tried per width; of more, as many at even distances


@dataclass(frozen=True)
class Part:
    """What has one size in a whole model: the heads, or the neurons of all experts."""

    name: str  # of its groups: "attention", "mlp"
    units: int
    step: int  # sizes are multiples of it, or the whole
    cost: int  # parameters of one unit, of all groups

    def sizes(self, most: int, least: int = 0) -> list[int]:
        """Return the possible sizes from one to another, largest first."""
        multiples = range(self.step, min(self.units, most) + 1, self.step)
        found = {*multiples, *([self.units] if most == self.units else [])}
        return sorted((size for size in found if size >= least), reverse=True)


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
    parts: Sequence[Part],
    share: Fraction,
    most: Sizes,
    possible: Callable[[Sizes], bool] = lambda _: True,
    least: Sizes = MappingProxyType({}),
) -> list[Sizes]:
    """Return the sizes of parts whose parameters are nearest to a share of all, up to ``MOST_SPLITS`` of them.

    Args:
        parts: The one with the finest sizes last: it makes up for what the others keep.
        share: Of the parameters of all parts.
        most: Sizes of the next wider width.
        possible: Tells which sizes to take where there is a choice.
        least: Sizes of the next narrower width; none where there is none.

    Returns:
        All that lie within half a step of the finest part; where none does, the nearest. Of share 1 the whole.
    """
    if share == 1:  # a whole that is no multiple of its step may have a neighbour within half a step
        return [{part.name: part.units for part in parts}]
    *others, last = parts
    target = share * sum(part.cost * part.units for part in parts)
    found: list[tuple[Fraction, Sizes]] = []
    for sizes in itertools.product(*(part.sizes(most[part.name], least.get(part.name, 0)) for part in others)):
        left = target - sum(part.cost * size for part, size in zip(others, sizes, strict=True))
        size = min(last.sizes(most[last.name], least.get(last.name, 0)), key=lambda size: abs(size * last.cost - left))
        names = (part.name for part in parts)
        found.append((abs(size * last.cost - left), dict(zip(names, (*sizes, size), strict=True))))
    found = [each for each in found if possible(each[1])] or found
    allowed = max(Fraction(last.step * last.cost, 2), min(distance for distance, _ in found))
    near = [sizes for distance, sizes in found if distance <= allowed]
    return spread(near, MOST_SPLITS)


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """Return some of several values at even distances, the first and the last among them.

    >>> spread(range(11), 6), spread("ab", 3)
    ([0, 2, 4, 6, 8, 10], ['a', 'b'])
    """
    count = min(len(values), most)
    return [values[index * (len(values) - 1) // max(count - 1, 1)] for index in range(count)]


def class_finder(
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
