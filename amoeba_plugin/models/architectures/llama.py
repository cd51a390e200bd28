"""Llama, Mistral, Qwen2 and Qwen3: one decoder design, four sets of configuration fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import MistralConfig, PretrainedConfig, SeedOssConfig

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.architectures.gated import GatedDecoder

# Fields that mean the same in every class of the family and move along when a subnet changes its class.
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "dtype",
)  # fmt: skip


class LlamaFamily(GatedDecoder):
    """One design; where a class refuses a legal subnet, an identical class of the family holds it."""

    model_types = ("llama", "mistral", "qwen2", "qwen3")

    def subnet_config(
        self,
        config: PretrainedConfig,
        kept_layers: Sequence[int],
        units: Mapping[str, int],
        biased: frozenset[str] = frozenset(),
    ) -> PretrainedConfig:
        """Keep the model's class where it can hold the subnet, else take an identical one that can.

        Llama wants ``hidden_size % heads == 0`` and has one switch for all attention biases; Mistral computes the same
        and wants neither; SeedOss computes the same and has a separate switch for the output bias.
        """
        subnet = self.resized(config, kept_layers, units)
        if biased:
            return self._seed_oss(subnet)
        if config.model_type == "llama" and subnet.hidden_size % subnet.num_attention_heads:
            return self._mistral(subnet)
        return subnet

    def _mistral(self, subnet: PretrainedConfig) -> PretrainedConfig:
        if subnet.attention_bias or subnet.mlp_bias:
            return self._seed_oss(subnet)
        fields = {name: getattr(subnet, name) for name in SHARED_FIELDS if hasattr(subnet, name)}
        return MistralConfig(**fields, sliding_window=None, architectures=["MistralForCausalLM"])

    def _seed_oss(self, subnet: PretrainedConfig) -> PretrainedConfig:
        if subnet.model_type == "qwen3":
            raise ArchitectureError(
                "bias compensation on qwen3: no stock class has both q/k norms and a bias on down_proj; "
                "set bias_compensation: false in WidthShrinkingModifier"
            )
        if "sliding_attention" in (getattr(subnet, "layer_types", None) or []) or (
            subnet.model_type == "mistral" and subnet.sliding_window is not None
        ):
            raise ArchitectureError(
                f"bias compensation on {subnet.model_type} with sliding-window attention: the class that could hold "
                "the biases (SeedOss) has no window; set bias_compensation: false in WidthShrinkingModifier"
            )
        fields = {name: getattr(subnet, name) for name in SHARED_FIELDS if hasattr(subnet, name)}
        return SeedOssConfig(
            **fields,
            attention_bias=subnet.model_type == "qwen2" or bool(getattr(subnet, "attention_bias", False)),
            attention_out_bias=True,
            mlp_bias=True,
            residual_dropout=0.0,
            architectures=["SeedOssForCausalLM"],
        )
