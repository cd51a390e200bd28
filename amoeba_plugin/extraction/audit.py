"""Sizes that were asked for against sizes that are there, layer by layer, after every cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ChannelGroup


@dataclass(frozen=True)
class LinearSize:
    """One side of one linear: channels asked for, and channels there. Or a module that should be gone."""

    layer: int
    path: str
    side: str  # rows or columns, or parameters of what should be gone
    requested: int
    achieved: int


def audit_sizes(
    layers: Iterable[nn.Module],
    groups: Sequence[ChannelGroup],
    units: Sequence[Mapping[str, int]],
    gone: Mapping[int, Collection[str]] | None = None,
) -> list[LinearSize]:
    """List the sizes of every linear that shrinks, and of what is gone.

    Args:
        layers: Decoder layers that were cut.
        groups: Of the whole model.
        units: Per layer the units asked for, by group name.
        gone: By layer the paths of modules that it lacks.
    """
    sizes = []
    for index, (layer, wanted) in enumerate(zip(layers, units, strict=True)):
        absent = (gone or {}).get(index, ())
        for path in absent:
            left = sum(parameter.numel() for parameter in layer.get_submodule(path).parameters())
            sizes.append(LinearSize(index, path, "parameters", 0, left))
        for group in groups:
            if any(f"{group.consumer.path}.".startswith(f"{path}.") for path in absent):
                continue
            if not isinstance(layer.get_submodule(group.consumer.path), nn.Linear):
                continue  # experts, whose weights have three dimensions: extraction checks each as it fills it
            rows: dict[str, int] = {}  # projections fused in one linear add up
            for axis in group.producers:
                rows[axis.path] = rows.get(axis.path, 0) + wanted[group.name] * axis.channels_per_unit
            for path, requested in rows.items():
                achieved = layer.get_parameter(f"{path}.weight").shape[0]
                sizes.append(LinearSize(index, path, "rows", requested, achieved))
            columns = wanted[group.name] * group.consumer.channels_per_unit
            achieved = layer.get_parameter(f"{group.consumer.path}.weight").shape[1]
            sizes.append(LinearSize(index, group.consumer.path, "columns", columns, achieved))
    return sizes


def require_sizes(
    layers: Iterable[nn.Module],
    groups: Sequence[ChannelGroup],
    units: Sequence[Mapping[str, int]],
    gone: Mapping[int, Collection[str]] | None = None,
) -> None:
    """Refuse a cut that did not do what was asked for, in whichever layer; see :func:`audit_sizes`.

    Raises:
        ArchitectureError: Naming every linear whose size is another.
    """
    wrong = [
        f"layer {each.layer}, {each.path}: {each.requested} {each.side} asked for, {each.achieved} there"
        for each in audit_sizes(layers, groups, units, gone)
        if each.requested != each.achieved
    ]
    if wrong:
        raise ArchitectureError(
            f"the cut did not do what was asked for ({'; '.join(wrong)}); the architecture adapter's channel groups do "
            "not describe this model"
        )
