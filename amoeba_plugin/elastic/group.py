"""One channel group of one layer of an elastic model: its size, and the order of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amoeba_plugin.elastic.linear import ElasticLinear, PackedElasticLinear, convert_packed
from amoeba_plugin.elastic.repairs import Place, place_of
from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.errors import ArchitectureError, ArtifactError
from amoeba_plugin.models.adapter import ChannelGroup
from amoeba_plugin.models.packed_linear import dense_weight, is_packed, linear_device
from amoeba_plugin.models.partial_linear import PartialLinear
from amoeba_plugin.models.slices import joined, restore_parameters, slice_parameters
from amoeba_plugin.shape import SubnetShape

TRIED = "repaired_on_trial"


@dataclass(frozen=True)
class ElasticGroup:
    """One channel group of one layer, with its live modules; a fused linear comes once for each of its axes."""

    key: str
    group: ChannelGroup
    layer: nn.Module
    producers: tuple[PartialLinear, ...]
    consumer: PartialLinear
    norms: tuple[nn.Module, ...]
    repaired: dict[Place, str] = field(default_factory=dict)  # names of the consumer's buffers

    @classmethod
    def convert(cls, key: str, group: ChannelGroup, layer: nn.Module) -> ElasticGroup:
        """Make a group's modules elastic in place.

        Raises:
            ArchitectureError: If a linear is of a class that cannot be.
        """
        linears = {path: _elastic_linear(layer, path) for path in dict.fromkeys(axis.path for axis in group.producers)}
        norms = tuple(layer.get_submodule(axis.path) for axis in group.norms)
        for norm in norms:
            slice_parameters(norm)
        producers = tuple(linears[axis.path] for axis in group.producers)
        return cls(key, group, layer, producers, _elastic_linear(layer, group.consumer.path), norms)

    def restore(self) -> None:
        """Give the modules their hosts' classes back."""
        for linear in {*self.producers, self.consumer}:
            linear.restore()
        for norm in self.norms:
            restore_parameters(norm)

    @property
    def packed(self) -> bool:
        """Whether a linear of it keeps its weight packed."""
        return any(isinstance(each, PackedElasticLinear) for each in (*self.producers, self.consumer))

    def hold_repaired(self, weights: Mapping[Place, Tensor], dtype: torch.dtype) -> None:
        """Keep the weights that the consumer has at some shapes, in a dtype, beside the shared one.

        Raises:
            ArtifactError: If they are of another size than the consumer has.
        """
        for number, (place, weight) in enumerate(weights.items()):
            if weight.shape[0] != self.consumer.out_features or weight.shape[1] > self.consumer.in_features:
                raise ArtifactError(
                    f"the repaired weight of {self.key} is {tuple(weight.shape)}, its linear "
                    f"({self.consumer.out_features}, {self.consumer.in_features}): the strategy is of another model"
                )
            self.consumer.hold_repaired(f"repaired_{number}", weight.to(linear_device(self.consumer), dtype))
            self.repaired[place] = f"repaired_{number}"

    def try_repaired(self, weight: Tensor | None) -> str | None:
        """Keep a weight until the next one is tried; return its name, or ``None`` where there is none."""
        if weight is None:
            return None
        self.consumer.hold_repaired(TRIED, weight.to(linear_device(self.consumer)))
        return TRIED

    def repaired_at(self, shape: SubnetShape) -> str | None:
        """Return the name of the buffer that the consumer computes with at a shape; ``None``: it has none there."""
        place = place_of(shape, self.repaired)
        return None if place is None else self.repaired[place]

    def set_units(self, units: int, compensation_row: int | None, repaired: str | None = None) -> None:
        """Activate the first ``units`` units, and of the consumer a repaired weight of so many."""
        for module, values in self.active_fields(units, compensation_row, repaired):
            vars(module).update(values)

    def active_fields(
        self, units: int, compensation_row: int | None, repaired: str | None = None
    ) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Return which modules :meth:`set_units` writes to, and what; so that a shape's are looked up once.

        Written past ``nn.Module.__setattr__``, which takes ten times as long to write the same.
        """
        blocks: dict[PartialLinear, list[slice]] = {}
        for axis, linear in zip(self.group.producers, self.producers, strict=True):
            blocks.setdefault(linear, []).append(axis.prefix(units))
        of_norms = {
            norm: {name: (0, (axis.prefix(units),)) for name in norm._parameters}
            for axis, norm in zip(self.group.norms, self.norms, strict=True)
        }
        columns = units * self.group.consumer.channels_per_unit
        return [
            *((linear, {"active_rows": joined(rows)}) for linear, rows in blocks.items()),
            *((norm, {"active": active}) for norm, active in of_norms.items()),
            (self.consumer, {
                "active_in": columns, "compensation_row": compensation_row, "repaired": repaired
            }),
        ]  # fmt: skip

    def reorder(self, width: WidthStrategy, in_place: bool = True) -> None:
        """Bring the channels into the order of their importance and precompute the biases that stand in for missing
        ones; see :meth:`permute`."""
        order = width.order.get(self.key)
        if order is None:
            return
        if width.bias_compensation:
            self.consumer.register_buffer("compensation", self._compensation(width, order), persistent=False)
        self.permute(order, in_place)

    def reordered(self, means: Tensor, order: Tensor) -> Tensor:
        """Return the consumer's mean inputs, (channels,), in the order that its columns were brought into."""
        return means[self.group.consumer.channels(order)]

    @torch.no_grad()
    def permute(self, order: Tensor, in_place: bool = True) -> None:
        """Permute the channels by units, of dense weights themselves, of packed ones those that flow in and out.

        Args:
            order: (units,) int64.
            in_place: False: parameters may get other memory, which saves a copy, and their old one stays as it is.
        """
        for axis, module in zip(
            (*self.group.producers, *self.group.norms), (*self.producers, *self.norms), strict=True
        ):
            channels = axis.channels(order)
            run = slice(axis.first_channel, axis.first_channel + len(channels))
            for tensor in _by_row(module):
                _put(tensor, run, tensor.index_select(0, channels.to(tensor.device)), in_place)
        columns = self.group.consumer.channels(order)
        if isinstance(self.consumer, PackedElasticLinear):
            column_order = self.consumer.column_order
            column_order.copy_(column_order[columns.to(column_order.device)])
        else:
            weight = self.consumer.get_parameter("weight")
            _put(weight, slice(None), weight.index_select(1, columns.to(weight.device)), in_place)

    def _compensation(self, width: WidthStrategy, order: Tensor) -> Tensor:
        # b = W[:, pruned] @ mu[pruned]  (FLAP, arXiv:2312.11983, eq. 5), one row per width; in fp32
        consumer = self.group.consumer
        columns = consumer.channels(order)
        whole = dense_weight(self.consumer)
        weight = whole.float()[:, columns.to(whole.device)]
        mean = width.mean_input[self.key][columns].to(weight.device)
        rows = []
        for share in sorted(width.units, reverse=True):
            kept = width.units[share].get(self.key, self.group.units) * consumer.channels_per_unit
            # a copy, because the last bit of a product depends on where in memory its factors begin
            rows.append(weight[:, kept:].contiguous() @ mean[kept:])
        return torch.stack(rows).to(whole.dtype)


def consumer_weight(layer: nn.Module, group: ChannelGroup) -> Tensor:
    """Return the whole weight of a group's consumer, (out, in), detached, channels in the order that others see."""
    module = layer.get_submodule(group.consumer.path)
    return module.whole_weight() if isinstance(module, PartialLinear) else group.consumer.weight_of(module).detach()


def _elastic_linear(layer: nn.Module, path: str) -> PartialLinear:
    linear = layer.get_submodule(path)
    if not isinstance(linear, PartialLinear) and is_packed(linear):
        return convert_packed(linear)
    if type(linear) is not nn.Linear:
        raise ArchitectureError(
            f"{path} is a {type(linear).__module__}.{type(linear).__name__}, neither a plain nn.Linear nor a packed "
            "one: the model is already elastic, or carries an adapter; make it elastic before anything else"
        )
    return ElasticLinear.convert(linear)


def _by_row(module: nn.Module) -> list[Tensor]:
    if isinstance(module, PackedElasticLinear):
        return [module.row_order]
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _put(tensor: Tensor, rows: slice, permuted: Tensor, in_place: bool) -> None:
    # of a fused linear some rows are permuted: only a whole tensor can be exchanged
    if in_place or permuted.shape != tensor.shape:
        tensor[rows] = permuted
    else:
        tensor.data = permuted
