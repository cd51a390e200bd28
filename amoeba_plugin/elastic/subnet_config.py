"""Which class holds a subnet, and its configuration: a stock class, or one whose layers have sizes of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.modeling_per_layer import PerLayerSizes
from amoeba_plugin.models.registry import is_supported
from amoeba_plugin.runtime import compat

PER_LAYER_FILE = "modeling_per_layer.py"  # beside a checkpoint whose layers differ in size


def config_for(adapter: ArchitectureAdapter, whole: PretrainedConfig, sizes: LayerSizes) -> PretrainedConfig:
    """Return the configuration of the class that holds layers of these sizes: a stock one where they are alike.

    Args:
        adapter: Of the whole model.
        whole: Its configuration.
        sizes: Of the layers kept.

    Raises:
        ArchitectureError: If no class can hold them.
    """
    if sizes.alike:
        return adapter.subnet_config(whole, sizes.kept, sizes.largest, sizes.biased)
    # The whole model's sizes are valid for its class whatever its divisibility rules; layers only name what differs.
    common = dict(sizes.units[0])
    if not sizes.even:
        common = {group.name: group.units for group in adapter.channel_groups(whole)}
    if set(sizes.lost.values()) == {"mlp"} and len(sizes.lost) == len(sizes.kept):
        raise ArchitectureError(
            "no layer of this shape keeps its MLP, so that nothing would tell its checkpoint from a stock one; extract "
            "with --portable, or a deeper shape"
        )
    if sizes.lost and "mlp" in common:
        common["mlp"] = 1  # no layer's size: a stock class would fill what is missing at random, this it refuses
    config = adapter.subnet_config(whole, sizes.kept, common, sizes.biased)
    per_layer_class(config)
    _require_per_layer_config()
    overrides = _own_fields(adapter, whole, sizes, common, config)
    if sizes.lost:
        sublayers = adapter.sublayers(whole)
        config.stand_ins = {part: dict(sublayers[part].stand_ins) for part in sorted(set(sizes.lost.values()))}
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = overrides
    return config


def _own_fields(
    adapter: ArchitectureAdapter,
    whole: PretrainedConfig,
    sizes: LayerSizes,
    common: Mapping[str, int],
    config: PretrainedConfig,
) -> dict[int | str, dict[str, Any]]:
    """Return by position the fields of a layer that are not those of the model's configuration, and what it lacks."""
    stated = config.to_dict()
    overrides: dict[int | str, dict[str, Any]] = {}
    for position, units in enumerate(sizes.units):
        present = {name: count for name, count in units.items() if name != sizes.lost.get(position)}
        own = adapter.subnet_config(whole, sizes.kept, {**common, **present}, sizes.biased).to_dict()
        overrides[position] = {
            name: value for name, value in own.items() if type(value) is int and stated.get(name, value) != value
        }
        if position in sizes.lost:
            overrides[position]["skip"] = [sizes.lost[position]]
    return overrides


def _require_per_layer_config() -> None:
    if not compat.has_per_layer_config():
        raise ArchitectureError(
            "layers differ (allocation: global, granularity: sublayer), and this transformers has no "
            f"config.per_layer_config; install transformers>={compat.PER_LAYER_CONFIG_SINCE}, or extract with "
            "--portable (padded with zeros to a stock class)"
        )


def is_per_layer(config: PretrainedConfig) -> bool:
    """Return whether a configuration gives layers sizes of their own, so that its class is remote code."""
    return bool(getattr(config, "is_heterogeneous", False))


def why_not_cut_again(config: PretrainedConfig) -> str | None:
    """Say why a subnet of a configuration cannot be made elastic and cut itself, or ``None`` where it can."""
    reason = "its layers differ" if is_per_layer(config) else None
    if not is_supported(config.model_type):
        reason = f"{config.model_type}, the class that holds it, is no architecture that can be cut"
    return None if reason is None else f"{reason}: cut other shapes from the elastic checkpoint"


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
