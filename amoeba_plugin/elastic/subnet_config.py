"""Which class holds a subnet, and its configuration: a stock class, or one whose layers have sizes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.subnet_plan import SubnetPlan
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter, group_key
from amoeba_plugin.models.modeling_per_layer import PerLayerSizes
from amoeba_plugin.shape import SubnetShape

PER_LAYER_FILE = "modeling_per_layer.py"  # beside a checkpoint whose layers differ in size


def subnet_config(elastic: ElasticModel | SubnetPlan, shape: SubnetShape, portable: bool = False) -> PretrainedConfig:
    """Return the configuration of the class that holds a shape.

    Raises:
        ArchitectureError: If no class can hold it.
    """
    sizes = layer_units(elastic, shape)
    kept, largest = elastic.kept_layers(shape), largest_units(sizes)
    compensated = elastic.strategy.width.bias_compensation and shape.width != 1
    biased = frozenset(largest) if compensated else frozenset()
    lost = lost_sublayers(elastic, shape)
    if portable or not (lost or differ(sizes)):
        config = elastic.adapter.subnet_config(elastic.config, kept, largest, biased)
    else:
        config = per_layer_config(elastic.adapter, elastic.config, kept, sizes, biased, lost)
    config.name_or_path = elastic.config.name_or_path
    vars(config).pop("quantization_config", None)  # what is cut from packed weights is dense
    return config


def layer_units(elastic: ElasticModel | SubnetPlan, shape: SubnetShape) -> list[dict[str, int]]:
    """Return per kept layer the units of each group at a shape."""
    groups = elastic.adapter.channel_groups(elastic.config)
    return [
        {group.name: elastic.units(shape.width, group_key(index, group), group) for group in groups}
        for index in elastic.kept_layers(shape)
    ]


def lost_sublayers(elastic: ElasticModel | SubnetPlan, shape: SubnetShape) -> dict[int, str]:
    """Return what layers kept in part have lost at a shape, by position among the layers kept."""
    lost = elastic.lost(shape)
    return {position: lost[index] for position, index in enumerate(elastic.kept_layers(shape)) if index in lost}


def differ(sizes: Sequence[Mapping[str, int]]) -> bool:
    """Tell whether layers are not all of one size."""
    return any(units != sizes[0] for units in sizes)


def largest_units(sizes: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return per group the most units that a layer has.

    >>> largest_units([{"attention": 2, "mlp": 9}, {"attention": 3, "mlp": 8}])
    {'attention': 3, 'mlp': 9}
    """
    return {name: max(units[name] for units in sizes) for name in sizes[0]}


def per_layer_config(
    adapter: ArchitectureAdapter,
    whole: PretrainedConfig,
    kept: Sequence[int],
    sizes: Sequence[Mapping[str, int]],
    biased: frozenset[str],
    lost: Mapping[int, str],
) -> PretrainedConfig:
    """Return the configuration of a subnet whose layers differ in size, or lack a sublayer.

    Args:
        adapter: Of the whole model.
        whole: Its configuration.
        kept: Indices of the layers kept.
        sizes: Of each the units per group.
        biased: See :meth:`ArchitectureAdapter.subnet_config`.
        lost: By position the sublayer that a layer lacks, "attention" or "mlp".

    Raises:
        ArchitectureError: If no class can hold it.
    """
    # The whole model's sizes are valid for its class whatever its divisibility rules; layers only name what differs.
    common = {group.name: group.units for group in adapter.channel_groups(whole)} if differ(sizes) else dict(sizes[0])
    if set(lost.values()) == {"mlp"} and len(lost) == len(kept):
        raise ArchitectureError(
            "no layer of this shape keeps its MLP, so that nothing would tell its checkpoint from a stock one; extract "
            "with --portable, or a deeper shape"
        )
    if lost and "mlp" in common:  # no layer's size: a stock class would fill what is missing at random, this it refuses
        common["mlp"] = 1
    config = adapter.subnet_config(whole, kept, common, biased)
    per_layer_class(config)
    if not hasattr(PretrainedConfig, "per_layer_config"):
        raise ArchitectureError(
            "layers differ (allocation: global, granularity: sublayer), and this transformers has no "
            "config.per_layer_config; install transformers>=5.15, or extract with --portable (padded with zeros to a "
            "stock class)"
        )
    stated, sublayers = config.to_dict(), adapter.sublayers(whole) if lost else {}
    overrides: dict[int | str, dict[str, Any]] = {}
    for position, units in enumerate(sizes):
        present = {name: count for name, count in units.items() if name != lost.get(position)}
        own = adapter.subnet_config(whole, kept, common | present, biased).to_dict()
        overrides[position] = {
            name: value for name, value in own.items() if type(value) is int and stated.get(name, value) != value
        }
        if position in lost:
            overrides[position]["skip"] = [lost[position]]
    if lost:
        config.stand_ins = {part: dict(sublayers[part].stand_ins) for part in sorted(set(lost.values()))}
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = overrides
    return config


def is_per_layer(config: PretrainedConfig) -> bool:
    """Return whether a configuration gives layers sizes of their own, so that its class is remote code."""
    return bool(getattr(config, "is_heterogeneous", False))


def per_layer_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class that builds every layer of a stock model from a configuration of its own.

    Raises:
        ArchitectureError: If there is none for the model that the configuration describes.
    """
    stock: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]  # type: ignore[assignment]
    found = next((each for each in PerLayerSizes.__subclasses__() if issubclass(each, stock)), None)
    if found is None:
        raise ArchitectureError(
            f"layers differ (allocation: global, granularity: sublayer), and there is no per-layer class for "
            f"{stock.__name__}; extract with --portable (padded with zeros to a stock class), or select with "
            "allocation: uniform and granularity: layer"
        )
    return found


def build(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return a new model of the class that a configuration is for; ``options`` are those of ``from_config``."""
    model: PreTrainedModel
    if is_per_layer(config):
        model = per_layer_class(config)._from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_config(config, **options)
    return model


def weightless(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of a configuration without weights."""
    with torch.device("meta"):
        return build(config)
