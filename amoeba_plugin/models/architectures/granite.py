"""Granite and SmolLM3: Llama's design with switches for all biases, and a few fields of their own."""

from __future__ import annotations

from transformers import PretrainedConfig

from amoeba_plugin.models.architectures.gated import GatedDecoder


class SwitchedBiases(GatedDecoder):
    """One switch adds biases to all attention projections, one to all of the MLP's; those not used are zero.

    Granite's multipliers are scalars and stay; of SmolLM3's ``no_rope_layers`` the entries of the kept layers stay.
    """

    model_types = ("granite", "smollm3")
    per_layer_fields = ("layer_types", "no_rope_layers")

    def allow_biases(self, subnet: PretrainedConfig) -> None:
        """Switch all biases on."""
        subnet.attention_bias = subnet.mlp_bias = True
