"""Phi-3 and Phi-4: q, k and v in one linear, gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ChannelAxis, ChannelGroup
from amoeba_plugin.models.architectures.gated import GatedDecoder, head_size, queries_per_unit


@dataclass(frozen=True)
class _Resized:
    """A live configuration in which one attention finds its own number of heads; all else is the model's."""

    whole: PretrainedConfig
    num_attention_heads: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "whole":  # while being copied there is nothing to ask yet
            raise AttributeError(name)
        return getattr(self.whole, name)


class Phi3(GatedDecoder):
    """The parts of a fused linear are axes of one path, each of which keeps a prefix."""

    model_types = ("phi3",)

    def channel_groups(self, config: PretrainedConfig) -> tuple[ChannelGroup, ...]:
        """Return the usual groups, their producers as parts of the fused linears."""
        attention, mlp = super().channel_groups(config)
        return _fused(attention, "self_attn.qkv_proj"), _fused(mlp, "mlp.gate_up_proj")

    def set_units(self, layer: nn.Module, group: ChannelGroup, units: int) -> None:
        """Tell attention where q, k and v begin in the output of ``qkv_proj``."""
        if group.name != "attention":
            return
        attention: Any = layer.self_attn
        config = attention.config.whole if isinstance(attention.config, _Resized) else attention.config
        attention.num_key_value_heads = units
        heads = units * queries_per_unit(config)
        attention.config = config if units == group.units else _Resized(config, heads)

    def resized(
        self, config: PretrainedConfig, kept_layers: Sequence[int], units: Mapping[str, int]
    ) -> PretrainedConfig:
        """Return a copy with the subnet's sizes.

        Raises:
            ArchitectureError: If rotary factors are listed: the class counts them by ``hidden_size // heads``.
        """
        subnet = super().resized(config, kept_layers, units)
        listed = config.rope_parameters.get("long_factor")
        if listed is not None:
            share = config.rope_parameters["partial_rotary_factor"]
            if int(subnet.hidden_size // subnet.num_attention_heads * share) // 2 != len(listed):
                channels = config.num_attention_heads * head_size(config)
                raise ArchitectureError(
                    f"phi3 with long-context rotary factors and {subnet.num_attention_heads} of "
                    f"{config.num_attention_heads} heads: its class counts {len(listed)} factors by "
                    "hidden_size // heads and refuses others; keep attention whole with "
                    f"round_to: {{attention: {channels}}} in WidthShrinkingModifier (widths of 1/2 and more)"
                )
        return subnet


def _fused(group: ChannelGroup, path: str) -> ChannelGroup:
    parts, first = [], 0
    for axis in group.producers:
        parts.append(ChannelAxis(path, axis.channels_per_unit, first))
        first += group.units * axis.channels_per_unit
    return ChannelGroup(group.name, group.units, tuple(parts), group.consumer)
