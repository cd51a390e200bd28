"""Which units every width keeps: scores of channels, made comparable, and shared out over layers.

A unit is what a group shrinks by: a KV group with its query heads, or an MLP neuron. Kept sets are nested: each width
keeps a prefix of one order.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.errors import ArchitectureError, DataError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelAxis, ChannelGroup, group_key
from amoeba_plugin.models.packed_linear import is_packed
from amoeba_plugin.runtime.module_calls import onloaded
from amoeba_plugin.selection.activation_stats import ActivationStats
from amoeba_plugin.selection.importance import (
    AnyImportance,
    CoupledWeights,
    GroupImportance,
    Importance,
    MomentImportance,
)
from amoeba_plugin.selection.repair.moments import Moments
from amoeba_plugin.selection.width.allocation import RankedGroup, allocated, rounding_steps
from amoeba_plugin.selection.width.task import WidthTask

logger = logging.getLogger(__name__)


def rank_widths(task: WidthTask) -> WidthStrategy:
    """Order the units of every group by importance and decide how many each width keeps.

    Returns:
        The strategy, widths largest first.

    Raises:
        RecipeError: If a width, an allocation or a rounding is impossible.
        DataError: If statistics are missing, or scores are not finite.
    """
    model, adapter = task.model, task.adapter
    shares = require_widths(task.widths)
    steps = rounding_steps(adapter.channel_groups(model.config), task.round_to)
    layers = adapter.layers(model)
    require_anchors(task.anchors, len(layers))
    _require_statistics(task)
    ranked = []
    for index, layer in enumerate(layers):
        with onloaded(layer.modules()):
            for group in adapter.channel_groups(model.config):
                ranked.append(replace(rank_group(task, index, group), anchored=index in task.anchors))
    units = allocated(ranked, shares, steps, task.allocation)
    if task.bias_compensation:
        _tell_where_biases_go(model.config, adapter, units[shares[-1]])
    means = {each.key: task.statistics[each.key].mean.float().cpu() for each in ranked if task.bias_compensation}
    return WidthStrategy(
        units,
        {each.key: each.order.cpu() for each in ranked},
        means,
        task.importance.name,
        task.allocation,
        task.bias_compensation,
    )


def rank_group(task: WidthTask, index: int, group: ChannelGroup) -> RankedGroup:
    """Score the units of one group of layer ``index``.

    Raises:
        DataError: If a score is NaN or infinite, or gradients are missing.
    """
    layer, importance, key = task.adapter.layers(task.model)[index], task.importance, group_key(index, group)
    if isinstance(importance, GroupImportance):
        coupled = _coupled(layer, index, group, task.gradients, importance)
        scores = standardised(_finite(importance.score(coupled), key, importance))
    elif isinstance(importance, MomentImportance):
        moments, weight = _moments(task, key), group.consumer.weight(layer).detach()
        errors = importance.score(weight, moments.all, group.consumer.channels_per_unit)
        scores = standardised(_finite(errors, key, importance))
    else:
        stats = task.statistics.get(key) or ActivationStats.empty(group.channels)
        channels = _finite(importance.score(stats, group.consumer.weight(layer).detach()), key, importance)
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


def _moments(task: WidthTask, key: str) -> Moments:
    if task.moments is None or key not in task.moments:
        raise DataError(
            f"importance {task.importance.name} needs the second moments of {key}; take them by "
            "collect_moments(LayerRuns.of(model, adapter, batches), moments)"
        )
    return task.moments[key]


def _finite(scores: Tensor, key: str, importance: AnyImportance) -> Tensor:
    """Return scores in fp64 on the CPU; refuse those that are NaN or infinite."""
    scores = scores.double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise DataError(
            f"importance {importance.name} of {key} is NaN or infinite; check the weights and the calibration data"
        )
    return scores


def standardised(scores: Tensor) -> Tensor:
    """Return (channels,) scores with mean 0 and standard deviation 1; zeros where all are the same.

    >>> standardised(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    """
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def require_widths(widths: Sequence[Fraction]) -> list[Fraction]:
    """Return widths as fractions, each once, largest first.

    Raises:
        RecipeError: If there are none, or one lies outside (0, 1].
    """
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


def require_anchors(anchors: Collection[int], layers: int) -> None:
    """Refuse anchors that a model of so many layers has not, or that are all of them.

    Raises:
        RecipeError: Naming the anchors, and the layers there are.
    """
    outside = sorted(set(anchors) - set(range(layers)))
    if outside or (anchors and len(set(anchors)) == layers):
        raise RecipeError(
            f"anchor_layers {sorted(set(anchors))} are impossible: the model has layers 0..{layers - 1}, and one of "
            "them at least must shrink"
        )


def _require_statistics(task: WidthTask) -> None:
    """Refuse statistics that lack a group, or are of other channels than its; where none are needed, take anything."""
    scored = isinstance(task.importance, Importance) and task.importance.needs_statistics
    if not (scored or task.bias_compensation):
        return
    for index in range(len(task.adapter.layers(task.model))):
        for group in task.adapter.channel_groups(task.model.config):
            key = group_key(index, group)
            found = len(task.statistics[key].mean) if key in task.statistics else None
            if found != group.channels:
                asker = f"importance {task.importance.name}" if scored else "bias_compensation"
                raise DataError(
                    f"{asker} needs statistics of {key} over {group.channels} channels, there are "
                    f"{'none' if found is None else f'{found} channels'}; collect them on this model"
                )
