"""Mixtures of experts, whose weights transformers keeps in three dimensions: (experts, out, in).

The neurons of every expert are a channel group of their own, with an order of its own; all experts of a layer keep the
same number of them, which is what a stock class can hold. Both halves of ``gate_up_proj`` keep a prefix, so its active
part is copied once per forward, while that of ``down_proj`` is a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amoeba_plugin.elastic.repairs import Place, place_of
from amoeba_plugin.errors import ArchitectureError, ShapeError
from amoeba_plugin.models.adapter import ChannelGroup
from amoeba_plugin.models.slices import SlicedModule, joined, restore_parameters, slice_parameters
from amoeba_plugin.shape import SubnetShape

TRIED, TRIAL = "repaired_on_trial", (None, Fraction(0))  # a width that no shape has


@dataclass(frozen=True)
class ElasticExperts:
    """The experts of one layer; made by :meth:`convert`."""

    module: Any  # a SlicedModule of the host's class
    layer: nn.Module
    groups: Mapping[str, ChannelGroup]  # by key, one per expert
    repaired: dict[Place, str] = field(default_factory=dict)  # names of the module's buffers

    @classmethod
    def convert(cls, layer: nn.Module, groups: Mapping[str, ChannelGroup]) -> ElasticExperts:
        """Make a layer's experts elastic at full size, in place.

        Raises:
            ArchitectureError: If they are elastic already, or their parameters are not three-dimensional.
        """
        path = next(iter(groups.values())).consumer.path
        module = layer.get_submodule(path)
        if isinstance(module, SlicedModule) or any(each.dim() != 3 for each in module.parameters(recurse=False)):
            raise ArchitectureError(
                f"{path} is a {type(module).__name__} that is already elastic, or keeps its experts apart; load the "
                "model with transformers, in full precision, and make it elastic before anything else"
            )
        slice_parameters(module)
        return cls(module, layer, groups)

    @torch.no_grad()
    def reorder(self, order: Mapping[str, Tensor]) -> None:
        """Permute every expert's neurons, in place; experts without an order stay."""
        for key, group in self.groups.items():
            if key not in order:
                continue
            for axis in group.producers:
                weight, channels = axis.weight(self.layer), axis.channels(order[key])
                run = weight[axis.first_channel : axis.first_channel + len(channels)]
                run.copy_(weight[channels.to(weight.device)])
            weight, channels = group.consumer.weight(self.layer), group.consumer.channels(order[key])
            weight.copy_(weight[:, channels.to(weight.device)])

    def hold_repaired(self, weights: Mapping[str, Mapping[Place, Tensor]], dtype: torch.dtype) -> None:
        """Keep the weights that the experts' consumers have at some shapes, by key, beside the shared ones."""
        like = next(self.module.parameters())
        for number, place in enumerate(next(iter(weights.values()), {})):
            together = torch.stack([weights[key][place] for key in self.groups])
            self.module.register_buffer(f"repaired_{number}", together.to(like.device, dtype), persistent=False)
            self.repaired[place] = f"repaired_{number}"

    def try_repaired(self, weights: Mapping[str, Tensor]) -> str | None:
        """Keep weights, by key, until the next ones are tried; return their name, or ``None`` where there are none."""
        if not self.groups.keys() <= weights.keys():
            return None
        like = self.module.get_parameter(self.consumer)
        together = torch.stack([weights[key] for key in self.groups]).to(like.device, like.dtype)
        self.module.register_buffer(TRIED, together, persistent=False)
        self.repaired[TRIAL] = TRIED
        return TRIED

    @property
    def active_repaired(self) -> str | None:
        """The name of the buffer that the consumers compute with now."""
        name: str | None = self.module.replaced.get(self.consumer)
        return name

    def repaired_at(self, shape: SubnetShape) -> str | None:
        """Return the name of the buffer that the consumers compute with at a shape; ``None``: they have none there."""
        place = place_of(shape, self.repaired)
        return None if place is None else self.repaired[place]

    @property
    def consumer(self) -> str:
        """The name of the parameter that reads the neurons."""
        return next(iter(self.groups.values())).consumer.parameter

    def set_units(self, units: Mapping[str, int], repaired: str | None = None) -> None:
        """Activate the first units of every expert.

        Args:
            units: By key; missing ones are whole.
            repaired: The buffer that takes the place of the consumers' active columns.

        Raises:
            ShapeError: If experts would differ, which no class can hold.
        """
        sizes = {units.get(key, group.units) for key, group in self.groups.items()}
        if len(sizes) != 1:
            raise ShapeError(
                f"the experts of one layer keep {', '.join(map(str, sorted(sizes)))} neurons; they must keep the same "
                "number: select with allocation: uniform"
            )
        kept, group = sizes.pop(), next(iter(self.groups.values()))
        assert isinstance(self.module, SlicedModule)
        self.module.active = {
            group.producers[0].parameter: (1, joined(axis.prefix(kept) for axis in group.producers)),
            group.consumer.parameter: (2, (group.consumer.prefix(kept),)),
        }
        self.module.replaced = {} if repaired is None else {self.consumer: repaired}

    def restore(self) -> None:
        """Turn them into ordinary experts again, in place."""
        for name in self.repaired.values():
            delattr(self.module, name)
        self.repaired.clear()
        restore_parameters(self.module)


def expert_inputs(group: ChannelGroup, module: Any, args: tuple[Tensor, ...], present: Tensor) -> Tensor:
    """Return what flows into an expert's ``down_proj``, which no module of its own would show.

    Args:
        group: One expert's.
        module: The experts.
        args: Of its forward: states (tokens, hidden), and the experts chosen (tokens, top k).
        present: (tokens,) bool; padded tokens are left out.

    Returns:
        (tokens that chose this expert, neurons), before routing weights.
    """
    states, chosen = args[0], args[1]
    assert group.consumer.expert is not None
    rows = states[torch.eq(chosen, group.consumer.expert).any(dim=-1) & present]
    # The activation is the host's own; of its ways to compute the product around it, this is the plain one.
    return module._apply_gate(functional.linear(rows, group.producers[0].weight_of(module)))  # type: ignore[no-any-return]
