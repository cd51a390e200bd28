"""How many units every width keeps: one size in every layer, or one threshold over all of them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.adapter import ChannelGroup

logger = logging.getLogger(__name__)
EXPERT_NEURONS = 8  # 16 bytes of bfloat16


@dataclass(frozen=True)
class RankedGroup:
    """One group of one layer: what its units are worth and what they cost."""

    key: str
    group: ChannelGroup
    scores: Tensor  # (units,) fp64, comparable over layers and groups
    cost: int  # of one unit, from unit_cost
    anchored: bool = False  # keeps all its units at every width

    @property
    def order(self) -> Tensor:
        """(units,) int64, most important first; equal scores in the order of their indices."""
        return torch.argsort(self.scores, descending=True, stable=True)


def allocated(
    ranked: Sequence[RankedGroup], shares: Sequence[Fraction], steps: Mapping[str, int], allocation: str
) -> dict[Fraction, dict[str, int]]:
    """Return per width the units kept per group key.

    Args:
        ranked: The groups of all layers.
        shares: The widths, largest first.
        steps: Units that sizes are multiples of, by group name; from :func:`rounding_steps`.
        allocation: ``uniform`` (:func:`uniform_units`) or ``global`` (:func:`global_units`).

    Raises:
        RecipeError: If there is no such allocation, or a width is impossible.
    """
    ways = {"uniform": uniform_units, "global": global_units}
    if allocation not in ways:
        raise RecipeError(f"allocation '{allocation}' does not exist; take uniform or global")
    units = {share: ways[allocation](ranked, share, steps) for share in shares}
    tell_equal(units)
    return units


def tell_equal(units: Mapping[Fraction, Mapping[str, int]]) -> None:
    """Warn of neighbouring widths that are the same."""
    for wider, narrower in pairwise(units):
        if units[wider] == units[narrower]:
            logger.warning(
                "widths %s and %s keep the same units: rounding leaves no size between them", wider, narrower
            )


def nearest_size(units: int, share: Fraction, step: int) -> int:
    """Return the multiple of ``step`` units nearest to a share of them.

    Of two equally near the larger one; 0 if there is none above 0.

    >>> nearest_size(8, Fraction(5, 8), 2), nearest_size(4, Fraction(1, 16), 1), nearest_size(4, Fraction(1), 3)
    (6, 1, 4)
    """
    if share == 1:
        return units
    nearest = math.floor(share * units / step + Fraction(1, 2))
    size = min(nearest, units // step) * step
    return max(size, 1) if step == 1 else size


def uniform_units(ranked: Sequence[RankedGroup], share: Fraction, steps: Mapping[str, int]) -> dict[str, int]:
    """Return the units kept per group key: the size nearest to the share, the same in every layer but the anchors.

    Args:
        ranked: The groups of all layers.
        share: The width: which part of the whole to keep, in (0, 1].
        steps: Units that sizes are multiples of, by group name; from :func:`rounding_steps`.

    Raises:
        RecipeError: If rounding leaves nothing, or the anchors alone are more than the share.
    """
    sizes: dict[str, int] = {}
    layers = Counter(each.group.name for each in ranked)
    anchored = Counter(each.group.name for each in ranked if each.anchored)
    told: set[str] = set()
    for each in ranked:
        name, units, step = each.group.name, each.group.units, steps[each.group.name]
        own = share if each.anchored else other_share(share, Fraction(anchored[name], layers[name]))
        size = units if each.anchored else nearest_size(units, own, step)
        if not size:
            per_unit = each.group.consumer.channels_per_unit
            possible = ", ".join(str(count * per_unit) for count in range(step, units + 1, step))
            raise RecipeError(
                f"width {share} of {name} is {own * each.group.channels} of {each.group.channels} channels, of which "
                f"round_to leaves nothing; sizes possible are {possible} channels: take a larger "
                f"width or a smaller round_to for {name}"
            )
        if not each.anchored and own * units < Fraction(1, 2) and name not in told:
            told.add(name)
            logger.warning("width %s of %d %s units is less than half a unit; every layer keeps one", own, units, name)
        sizes[each.key] = size
    return sizes


def kept_units(
    groups: Sequence[ChannelGroup], width: Fraction, round_to: int | Mapping[str, int], anchored: Fraction = Fraction(0)
) -> dict[str, int]:
    """Return how many units of each group a width keeps with uniform allocation, before anything is scored.

    Where a share of the layers is ``anchored``, this is what all others keep.

    Raises:
        RecipeError: If ``round_to`` names a group that does not exist, does not fit its units, or leaves nothing.
    """
    unscored = [RankedGroup(group.name, group, torch.empty(0), 0) for group in groups]
    return uniform_units(unscored, other_share(width, anchored), rounding_steps(groups, round_to))


def other_share(share: Fraction, anchored: Fraction) -> Fraction:
    """Return the share that other layers keep where ``anchored`` of the whole keep everything.

    >>> other_share(Fraction(1, 2), Fraction(6, 32))
    Fraction(5, 13)
    """
    # x = (r L - A) / (L - A)  (ELMS, arXiv:2409.09071, section 3.1)
    if share == 1:
        return share
    if share <= anchored:
        raise RecipeError(
            f"width {share} is impossible with these anchor_layers: they alone are {float(anchored):.3g} of the whole; "
            f"name fewer of them, or take widths above {float(anchored):.3g}"
        )
    return (share - anchored) / (1 - anchored)


def global_units(ranked: Sequence[RankedGroup], share: Fraction, steps: Mapping[str, int]) -> dict[str, int]:
    """Return the units kept per group key by one threshold over all layers (FLAP's, as AmoebaLLM uses it).

    Args:
        ranked: The groups of all layers; anchored ones keep everything, and their parameters count as kept.
        share: The width: which part of the whole to keep, in (0, 1].
        steps: Units that sizes are multiples of, by group name; from :func:`rounding_steps`.

    Raises:
        RecipeError: If the anchors alone are more than the share.
    """
    sizes = {each.key: each.group.units for each in ranked}
    if share == 1:
        return sizes
    others = [each for each in ranked if not each.anchored]
    cost = {each.key: each.cost * each.group.units for each in ranked}
    anchored = 1 - Fraction(sum(cost[each.key] for each in others), sum(cost.values()))
    joint = experts_together(others)
    alone = [each for each, _ in joint]
    counts = global_prefix([each.scores for each in alone], [each.cost for each in alone], other_share(share, anchored))
    for (each, keys), count in zip(joint, counts, strict=True):
        units, step = each.group.units, steps[each.group.name]
        # a group that the threshold leaves whole stays whole; all others keep one step at least
        sizes |= dict.fromkeys(keys, max(nearest_size(units, Fraction(count, units), step), step))
    _tell_rescued(share, alone, counts)
    return sizes


def experts_together(ranked: Sequence[RankedGroup]) -> list[tuple[RankedGroup, list[str]]]:
    """Make one group of the experts of a layer, which must keep the same number of neurons.

    Its unit j is the j-th best neuron of every expert: worth the mean of their scores, at the sum of their costs.

    Returns:
        Every group, or the experts of a layer as one, with the keys of the groups it stands for.
    """
    parts: dict[str, list[RankedGroup]] = {}
    for each in ranked:
        expert = each.group.consumer.expert
        parts.setdefault(each.key if expert is None else each.key.removesuffix(f".{expert}"), []).append(each)
    joint = []
    for key, experts in parts.items():
        scores = torch.stack([each.scores.sort(descending=True).values for each in experts]).mean(dim=0)
        cost = sum(each.cost for each in experts)
        joint.append((replace(experts[0], key=key, scores=scores, cost=cost), [each.key for each in experts]))
    return joint


def _tell_rescued(share: Fraction, ranked: Sequence[RankedGroup], counts: Sequence[int]) -> None:
    """Warn of groups whose best unit is worse than one that was left out."""
    ordered = [each.scores.sort(descending=True).values for each in ranked]
    left = [scores[count].item() for scores, count in zip(ordered, counts, strict=True) if count < len(scores)]
    rescued = [each.key for each, scores in zip(ranked, ordered, strict=True) if left and scores[0].item() < max(left)]
    if rescued:
        logger.warning(
            "width %s: the threshold would leave nothing of %s; each keeps its best unit. A width that small is better "
            "served by fewer layers",
            share,
            ", ".join(rescued),
        )


def global_prefix(scores: Sequence[Tensor], costs: Sequence[int], share: Fraction) -> list[int]:
    """Keep the best units of all groups together until their cost is nearest to a share of the whole cost.

    The best unit of every group comes first, so that no layer loses all its heads or neurons; the cost is then within
    half a unit of what was asked for, unless those alone cost more.

    Args:
        scores: Per group (units,), comparable.
        costs: Per group the parameters of one unit.
        share: Of the sum of all costs.

    Returns:
        Units kept per group; for a smaller share never more.
    """
    first = [torch.where(torch.arange(len(each)) == each.argmax(), math.inf, each) for each in scores]
    owner = torch.cat([torch.full((len(each),), index) for index, each in enumerate(scores)])
    order = torch.argsort(torch.cat(first), descending=True, stable=True)
    # threshold: the position where cumulative cost is nearest to share * total  (FLAP, AL-AM)
    cumulative = torch.tensor(costs)[owner[order]].cumsum(dim=0)
    target = share * int(cumulative[-1])
    distance = [abs(cost - target) for cost in cumulative.tolist()]
    count = max(distance.index(min(distance)) + 1, len(scores))
    return torch.bincount(owner[order[:count]], minlength=len(scores)).tolist()


def rounding_steps(groups: Sequence[ChannelGroup], round_to: Mapping[str, int] | int) -> dict[str, int]:
    """Return per group the units that a kept size is a multiple of.

    Neurons of experts come in eights even where ``round_to`` does not ask for it: the grouped matrix product that
    transformers computes experts with wants rows of whole 16 bytes.
    """
    names = [group.name for group in groups]
    wanted = dict.fromkeys(names, round_to) if isinstance(round_to, int) else dict(round_to)
    unknown = sorted(wanted.keys() - set(names))
    if unknown:
        raise RecipeError(f"round_to names {', '.join(unknown)}; this model's groups are {', '.join(names)}")
    steps = {}
    for group in groups:
        channels, per_unit = wanted.get(group.name, 1), group.consumer.channels_per_unit
        if channels < 1:
            raise RecipeError(
                f"round_to {channels} for {group.name} is impossible; take 1 (no rounding) or more channels"
            )
        if group.consumer.expert is not None and group.units % EXPERT_NEURONS == 0:
            channels = math.lcm(channels, EXPERT_NEURONS)
        step = math.lcm(channels, per_unit) // per_unit
        if step > group.units:
            raise RecipeError(
                f"round_to {channels} for {group.name} cannot be met: its {group.channels} channels go in units of "
                f"{per_unit}, and no multiple of both fits; take {per_unit} or 1"
            )
        steps[group.name] = step
    return steps
