"""OLMo 2: q and k are normalised over the whole projection, norms follow instead of precede."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from amoeba_plugin.models.adapter import ChannelAxis, ChannelGroup
from amoeba_plugin.models.architectures.gated import GatedDecoder


class Olmo2(GatedDecoder):
    """The norms of q and k have a weight per channel, which is sliced with the channels.

    With fewer heads the root mean square is that of the channels kept, so a narrow subnet is not the whole model with
    heads left out: it is what ``Olmo2ForCausalLM`` of that size computes.
    """

    model_types = ("olmo2",)
    attention_norms = ("post_attention_layernorm",)
    mlp_norms = ("post_feedforward_layernorm",)

    def channel_groups(self, config: PretrainedConfig) -> tuple[ChannelGroup, ...]:
        """Return the usual groups; attention's norms belong to it."""
        attention, mlp = super().channel_groups(config)
        query, key, _ = attention.producers
        norms = (
            ChannelAxis("self_attn.q_norm", query.channels_per_unit),
            ChannelAxis("self_attn.k_norm", key.channels_per_unit),
        )
        return replace(attention, norms=norms), mlp
