"""What ``strategy.json`` may say: kinds of its values, and what must agree in it and with its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class DepthDocument(_Document):
    """Layers kept by depth, as ``models.kept`` writes them."""

    objective: str
    selector: str = ""  # older files have none
    kept: dict[str, list[int | str]] = Field(min_length=1)
    metric: dict[str, float | None]
    search: dict[str, Any] = {}


class WidthDocument(_Document):
    """Units kept by width and group."""

    importance: str
    allocation: str
    bias_compensation: bool
    units: dict[str, dict[str, PositiveInt]]


class StrategyDocument(_Document):
    """All of it but format and version."""

    fingerprint: str
    tensors_sha256: str
    depth: DepthDocument
    width: WidthDocument
    repair: str = ""  # what repaired weights, by its name
    provenance: dict[str, Any]


def first_fault(error: ValidationError) -> str:
    """Return the first thing that a document says wrong, with its place: "width.units: Input should be ..."."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def require_depths(kept: Mapping[float, tuple[int, ...]], lost: Mapping[float, Mapping[int, str]]) -> None:
    """Refuse depths that do not keep as many layers as they say.

    Raises:
        ValueError: With the depth.
    """
    most = max(kept)
    for depth, layers in kept.items():
        if len(layers) - len(lost.get(depth, {})) / 2 != depth or not layers or layers[-1] >= most:
            raise ValueError(f"depth {depth} keeps layers {list(layers)} of {most}")
    if lost.get(most):
        raise ValueError(f"the largest depth, {most}, is not the whole model")


def require_units(units: Mapping[Fraction, Mapping[str, int]]) -> None:
    """Refuse widths that are none, keep other groups than the whole model has, or more than it has of one.

    Raises:
        ValueError: With the width.
    """
    if Fraction(1) not in units:
        raise ValueError("there is no width 1")
    whole = units[Fraction(1)]
    for width, kept in units.items():
        if not 0 < width <= 1:
            raise ValueError(f"width {width} is not between 0 and 1")
        if kept.keys() != whole.keys():
            raise ValueError(f"width {width} says nothing of {', '.join(sorted(whole.keys() ^ kept.keys()))}")
        over = next((key for key, count in kept.items() if count > whole[key]), None)
        if over is not None:
            raise ValueError(f"width {width} keeps {kept[over]} units of {over}, which has {whole[over]}")


def require_tensors(
    order: Mapping[str, Tensor], mean_input: Mapping[str, Tensor], whole: Mapping[str, int], compensated: bool
) -> None:
    """Refuse orders that are no permutations of a group's units, and mean inputs that are missing or not finite.

    Args:
        order: By group: (units,) int64.
        mean_input: By group: (channels,).
        whole: Units of every group.
        compensated: Biases stand in for missing channels.

    Raises:
        ValueError: With the group.
    """
    for key, each in order.items():
        if each.dtype != torch.int64 or not torch.equal(each.sort().values, torch.arange(whole.get(key, 0))):
            raise ValueError(f"the order of {key} is no permutation of its {whole.get(key, 0)} units")
    for key, means in mean_input.items():
        if not bool(means.isfinite().all()):
            raise ValueError(f"the mean input of {key} is not finite")
    missing = sorted(order.keys() - mean_input.keys()) if compensated else []
    if missing:
        raise ValueError(f"there is no mean input of {missing[0]}, whose missing channels are compensated")
