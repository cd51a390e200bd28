"""Sizes that were asked for against sizes that are there, layer by layer, after every cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup


@dataclass(frozen=True)
class LinearSize:
    """One side of one linear: channels asked for, and channels there. Or a module that should be gone."""

    layer: int
    path: str
    side: str  # rows or columns, or parameters of what should be gone
    requested: int
    achieved: int


def audit_sizes(
    layers: Iterable[nn.Module], adapter: ArchitectureAdapter, whole: PretrainedConfig, sizes: LayerSizes
) -> list[LinearSize]:
    """List the sizes of every linear that shrinks, and of what is gone.

    Args:
        layers: Decoder layers that were cut.
        adapter: Of the whole model.
        whole: Its configuration.
        sizes: What was asked for.
    """
    groups, sublayers = adapter.channel_groups(whole), adapter.sublayers(whole) if sizes.lost else {}
    found: list[LinearSize] = []
    for position, (layer, units) in enumerate(zip(layers, sizes.units, strict=True)):
        lost = sizes.lost.get(position)
        absent = () if lost is None else sublayers[lost].stand_ins.keys()
        found += _left_over(position, layer, absent)
        for group in groups:
            gone = any(f"{group.consumer.path}.".startswith(f"{path}.") for path in absent)
            if not gone and isinstance(layer.get_submodule(group.consumer.path), nn.Linear):
                found += _linears(position, layer, group, units)
            # of experts, whose weights have three dimensions, extraction checks each as it fills it
    return found


def _left_over(position: int, layer: nn.Module, absent: Collection[str]) -> Iterator[LinearSize]:
    for path in absent:
        left = sum(parameter.numel() for parameter in layer.get_submodule(path).parameters())
        yield LinearSize(position, path, "parameters", 0, left)


def _linears(position: int, layer: nn.Module, group: ChannelGroup, units: Mapping[str, int]) -> Iterator[LinearSize]:
    rows: dict[str, int] = {}  # projections fused in one linear add up
    for axis in group.producers:
        rows[axis.path] = rows.get(axis.path, 0) + units[group.name] * axis.channels_per_unit
    for path, requested in rows.items():
        yield LinearSize(position, path, "rows", requested, layer.get_parameter(f"{path}.weight").shape[0])
    path, columns = group.consumer.path, units[group.name] * group.consumer.channels_per_unit
    yield LinearSize(position, path, "columns", columns, layer.get_parameter(f"{path}.weight").shape[1])


def require_sizes(
    layers: Iterable[nn.Module], adapter: ArchitectureAdapter, whole: PretrainedConfig, sizes: LayerSizes
) -> None:
    """Refuse a cut that did not do what was asked for, in whichever layer; see :func:`audit_sizes`.

    Raises:
        ArchitectureError: Naming every linear whose size is another.
    """
    wrong = [
        f"layer {each.layer}, {each.path}: {each.requested} {each.side} asked for, {each.achieved} there"
        for each in audit_sizes(layers, adapter, whole, sizes)
        if each.requested != each.achieved
    ]
    if wrong:
        raise ArchitectureError(
            f"the cut did not do what was asked for ({'; '.join(wrong)}); the architecture adapter's channel groups do "
            "not describe this model"
        )
