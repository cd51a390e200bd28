"""Gemma 2 and the text models of Gemma 3: Llama's names, alternating sliding windows, soft-capped logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig

from amoeba_plugin.models.architectures.gated import GatedDecoder, require_divisible_hidden


class Gemma(GatedDecoder):
    """Caps, query scale and embedding scale do not depend on heads or neurons, so they stay."""

    model_types = ("gemma2", "gemma3_text")
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

    def resized(
        self, config: PretrainedConfig, kept_layers: Sequence[int], units: Mapping[str, int]
    ) -> PretrainedConfig:
        """Return a copy with the subnet's sizes; the heads must divide the hidden size."""
        subnet = super().resized(config, kept_layers, units)
        require_divisible_hidden(subnet, config)
        return subnet
