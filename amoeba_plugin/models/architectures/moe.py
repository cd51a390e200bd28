"""Mixtral and Qwen3-MoE: grouped-query attention, and experts instead of an MLP in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PretrainedConfig

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ChannelAxis, ChannelGroup
from amoeba_plugin.models.architectures.gated import GatedDecoder
from amoeba_plugin.models.sublayers import Sublayer

EXPERTS = "mlp.experts"


class MixtureOfExperts(GatedDecoder):
    """All experts stay; each keeps the same number of its own neurons. The router is left as it is."""

    model_types = ("mixtral", "qwen3_moe")

    def channel_groups(self, config: PretrainedConfig) -> tuple[ChannelGroup, ...]:
        """Return the attention group and one MLP group per expert.

        Raises:
            ArchitectureError: If some layers have an ordinary MLP instead.
        """
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            raise ArchitectureError(
                f"{config.model_type} with an ordinary MLP in some layers (mlp_only_layers, decoder_sparse_step): only "
                "models with experts in every layer are supported"
            )
        attention, _ = super().channel_groups(config)
        neurons = getattr(config, self._size_field(config))
        return attention, *(_expert_group(expert, neurons) for expert in range(config.num_experts))

    def residual_share(self, config: PretrainedConfig) -> float | None:
        """Return ``None``: each token has experts of its own."""
        return None

    def sublayers(self, config: PretrainedConfig) -> Mapping[str, Sublayer]:
        """Return attention, and the experts with their router as the MLP."""
        dense = super().sublayers(config)
        experts = replace(dense["mlp"], outputs=(f"{EXPERTS}.down_proj",))
        return {**dense, "mlp": experts}

    def resized(
        self, config: PretrainedConfig, kept_layers: Sequence[int], units: Mapping[str, int]
    ) -> PretrainedConfig:
        """Return a copy with the subnet's sizes."""
        subnet = super().resized(config, kept_layers, units)
        subnet.intermediate_size = config.intermediate_size
        setattr(subnet, self._size_field(config), units["mlp"])
        return subnet

    def _size_field(self, config: PretrainedConfig) -> str:
        return "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"


def _expert_group(expert: int, neurons: int) -> ChannelGroup:
    gate = ChannelAxis(EXPERTS, 1, 0, expert, "gate_up_proj")
    up = ChannelAxis(EXPERTS, 1, neurons, expert, "gate_up_proj")
    return ChannelGroup("mlp", neurons, (gate, up), ChannelAxis(EXPERTS, 1, 0, expert, "down_proj"))
