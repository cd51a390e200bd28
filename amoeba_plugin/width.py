"""Which units every width keeps: scores of channels, made comparable, and shared out over layers.

A unit is what a group shrinks by: a KV group with its query heads, or an MLP neuron. Kept sets are nested: each width
keeps a prefix of one order.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.architecture import ArchitectureAdapter, ChannelAxis, ChannelGroup, group_key
from amoeba_plugin.calibration import ActivationStats
from amoeba_plugin.elastic_linear import is_packed
from amoeba_plugin.errors import ArchitectureError, DataError, RecipeError
from amoeba_plugin.importance import CoupledWeights, GroupImportance, Importance
from amoeba_plugin.strategy import WidthStrategy

EXPERT_NEURONS = 8  # 16 bytes of bfloat16

logger = logging.getLogger(__name__)


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


def rank_widths(
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    stats: Mapping[str, ActivationStats],
    *,
    widths: Sequence[Fraction],
    importance: Importance | GroupImportance,
    gradients: Mapping[str, Tensor] | None = None,
    allocation: Literal["uniform", "global"] = "uniform",
    round_to: Mapping[str, int] | int = 1,
    anchors: Collection[int] = (),
    bias_compensation: bool = False,
) -> WidthStrategy:
    """Order the units of every group by importance and decide how many each width keeps.

    Args:
        model: The dense model, not changed.
        adapter: Its architecture.
        stats: By ``group_key``, from ``collect_statistics``; may lack groups where nothing needs them.
        widths: Shares kept, in (0, 1]. 1 keeps everything, whatever ``round_to`` is.
        importance: Scores channels or units.
        gradients: From ``loss_gradients`` of :func:`coupled_parameters`, for importances that need them.
        allocation: ``uniform`` keeps the same number of units in every layer: the share of that group's units.
            ``global`` is the paper's: one threshold over the units of all layers, so that the share counts the
            parameters of units, and layers differ; every group keeps its best unit at least, and all experts of a
            layer the same number (:func:`experts_together`).
        round_to: Consumer's channels that kept sizes are multiples of (the nearest one), for all groups or by group
            name. With ``global`` it moves the share away from the one asked for.
        anchors: Indices of layers that keep full width (ELMS). The others make up for them: their share is
            (width * layers - anchors) / (layers - anchors), so that the width is still that of the whole model. With
            ``global`` they are left out of the threshold, and their parameters count as kept.
        bias_compensation: Also store every channel's mean input.

    Returns:
        The strategy, widths largest first.

    Raises:
        RecipeError: If a width, an allocation or a rounding is impossible.
        DataError: If statistics are missing, or scores are not finite.
    """
    shares = _require_widths(widths)
    steps = rounding_steps(adapter.channel_groups(model.config), round_to)
    layers = adapter.layers(model)
    _require_anchors(anchors, len(layers))
    if bias_compensation or (isinstance(importance, Importance) and importance.needs_statistics):
        _require_statistics(model, adapter, stats, importance)
    ranked = [
        replace(rank_group(layer, index, group, stats, gradients or {}, importance), anchored=index in anchors)
        for index, layer in enumerate(layers)
        for group in adapter.channel_groups(model.config)
    ]
    if allocation == "uniform":
        units = {share: uniform_units(ranked, share, steps) for share in shares}
    elif allocation == "global":
        units = {share: _global_units(ranked, share, steps) for share in shares}
    else:
        raise RecipeError(f"allocation '{allocation}' does not exist; take uniform or global")
    for wider, narrower in pairwise(shares):
        if units[wider] == units[narrower]:
            logger.warning(
                "widths %s and %s keep the same units: rounding leaves no size between them", wider, narrower
            )
    if bias_compensation:
        _tell_where_biases_go(model.config, adapter, units[shares[-1]])
    return WidthStrategy(
        units,
        {each.key: each.order.cpu() for each in ranked},
        {each.key: stats[each.key].mean.float().cpu() for each in ranked} if bias_compensation else {},
        importance.name,
        allocation,
        bias_compensation,
    )


def rank_group(
    layer: nn.Module,
    index: int,
    group: ChannelGroup,
    stats: Mapping[str, ActivationStats],
    gradients: Mapping[str, Tensor],
    importance: Importance | GroupImportance,
) -> RankedGroup:
    """Score the units of one group of one layer.

    Raises:
        DataError: If a score is NaN or infinite, or gradients are missing.
    """
    key = group_key(index, group)
    if isinstance(importance, GroupImportance):
        scores = importance.score(_coupled(layer, index, group, gradients, importance)).double().cpu()
        _require_finite(scores, key, importance.name)
        scores = standardised(scores)
    else:
        weight = group.consumer.weight(layer).detach()
        channels = importance.score(stats.get(key) or ActivationStats.empty(group.channels), weight).double().cpu()
        _require_finite(channels, key, importance.name)
        if importance.square_attention and group.name == "attention":
            channels = channels.square()
        # score(unit) = mean of its channels' standardised scores  (FLAP, arXiv:2312.11983, section 4.2)
        scores = standardised(channels).view(group.units, -1).mean(dim=1)
    return RankedGroup(key, group, scores, unit_cost(layer, group))


def unit_cost(layer: nn.Module, group: ChannelGroup) -> int:
    """Return the parameters of one unit, biases not counted; their ratio is the cost of one group's unit in another's.

    A head in neurons of a gated MLP: 4 d/3 where every query head has its own keys and values, (2g + 2) d/3 for a KV
    group of g query heads, 2 d/3 for a query head alone; without a gate, half as much again.
    """
    # A producer's unit has its rows, over all inputs; the consumer's its columns, over all outputs.
    cost = sum(axis.channels_per_unit * axis.size(layer)[1] for axis in group.producers)
    return cost + group.consumer.channels_per_unit * group.consumer.size(layer)[0]


def coupled_parameters(model: PreTrainedModel, adapter: ArchitectureAdapter) -> dict[str, nn.Parameter]:
    """Return the weights of all groups of all layers, by "3.mlp.up_proj", or "3.mlp.experts.down_proj" of all experts.

    Raises:
        ArchitectureError: If one of them is packed.
    """
    return {
        _name(index, axis): _parameter(layer, axis)
        for index, layer in enumerate(adapter.layers(model))
        for group in adapter.channel_groups(model.config)
        for axis in (*group.producers, group.consumer)
    }


def _parameter(layer: nn.Module, axis: ChannelAxis) -> nn.Parameter:
    if is_packed(layer.get_submodule(axis.path)):
        raise ArchitectureError(
            f"{axis.path} is quantized, and packed weights have no gradients; take an importance without them (flap, "
            "wanda, magnitude), or select on the full-precision model"
        )
    return layer.get_parameter(f"{axis.path}.{axis.parameter}")


def _name(index: int, axis: ChannelAxis) -> str:
    return f"{index}.{axis.path}" if axis.expert is None else f"{index}.{axis.path}.{axis.parameter}"


def _coupled(
    layer: nn.Module, index: int, group: ChannelGroup, gradients: Mapping[str, Tensor], importance: GroupImportance
) -> CoupledWeights:
    axes = (*group.producers, group.consumer)
    weights = {axis: axis.weight(layer).detach() for axis in axes}
    if not importance.needs_gradients:
        return CoupledWeights(group, weights)
    missing = [_name(index, axis) for axis in axes if _name(index, axis) not in gradients]
    if missing:
        raise DataError(
            f"importance {importance.name} needs the gradient of {missing[0]}; take them by "
            "loss_gradients(model, coupled_parameters(model, adapter), batches)"
        )
    return CoupledWeights(group, weights, {axis: axis.part(gradients[_name(index, axis)]) for axis in axes})


def _require_finite(scores: Tensor, key: str, name: str) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise DataError(f"importance {name} of {key} is NaN or infinite; check the weights and the calibration data")


def standardised(scores: Tensor) -> Tensor:
    """Return (channels,) scores with mean 0 and standard deviation 1; zeros where all are the same.

    >>> standardised(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    """
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


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
        share: The width.
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


def _global_units(ranked: Sequence[RankedGroup], share: Fraction, steps: Mapping[str, int]) -> dict[str, int]:
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


def _require_widths(widths: Sequence[Fraction]) -> list[Fraction]:
    if not widths:
        raise RecipeError("widths are empty; give shares of channels in (0, 1], for example 1, 7/8, 3/4")
    outside = [str(width) for width in widths if not 0 < width <= 1]
    if outside:
        raise RecipeError(
            f"widths {', '.join(outside)} are impossible: a share of channels lies in (0, 1]; write 1, 7/8 or 0.75"
        )
    return sorted({Fraction(width) for width in widths}, reverse=True)


def _tell_where_biases_go(config: PretrainedConfig, adapter: ArchitectureAdapter, units: Mapping[str, int]) -> None:
    sizes = {group.name: units[group_key(0, group)] for group in adapter.channel_groups(config)}
    try:
        carrier = adapter.subnet_config(config, range(config.num_hidden_layers), sizes, frozenset(sizes))
    except ArchitectureError as error:
        logger.warning("biases that compensate for channels serve elastic use only, and extraction refuses: %s", error)
    else:
        logger.info("biases that compensate for channels are saved in the class of model type %s", carrier.model_type)


def _require_anchors(anchors: Collection[int], layers: int) -> None:
    outside = sorted(set(anchors) - set(range(layers)))
    if outside or (anchors and len(set(anchors)) == layers):
        raise RecipeError(
            f"anchor_layers {sorted(set(anchors))} are impossible: the model has layers 0..{layers - 1}, and one of "
            "them at least must shrink"
        )


def _require_statistics(
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    stats: Mapping[str, ActivationStats],
    importance: Importance | GroupImportance,
) -> None:
    for index in range(len(adapter.layers(model))):
        for group in adapter.channel_groups(model.config):
            key = group_key(index, group)
            found = len(stats[key].mean) if key in stats else None
            if found != group.channels:
                scored = isinstance(importance, Importance) and importance.needs_statistics
                asker = f"importance {importance.name}" if scored else "bias_compensation"
                raise DataError(
                    f"{asker} needs statistics of {key} over {group.channels} channels, there are "
                    f"{'none' if found is None else f'{found} channels'}; collect them on this model"
                )
