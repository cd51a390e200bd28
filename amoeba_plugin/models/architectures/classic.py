"""GPT-NeoX and OPT: multi-head attention, a plain MLP with biases, LayerNorms.

Their classes take the size of a head to be ``hidden_size // heads`` and have no field for another one, and no other
class computes the same. So heads stay, and width is that of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PretrainedConfig

from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelAxis, ChannelGroup, copy_config
from amoeba_plugin.models.sublayers import Sublayer


class GPTNeoX(ArchitectureAdapter):
    """Pythia and others; attention and MLP run in parallel on one residual, or one after the other."""

    model_types = ("gpt_neox",)
    final_norm = "final_layer_norm"

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return ``model.gpt_neox``."""
        return model.get_submodule("gpt_neox")

    def channel_groups(self, config: PretrainedConfig) -> tuple[ChannelGroup, ...]:
        """Return the MLP group (units: neurons)."""
        up, down = ChannelAxis("mlp.dense_h_to_4h", 1), ChannelAxis("mlp.dense_4h_to_h", 1)
        return (ChannelGroup("mlp", config.intermediate_size, (up,), down),)

    def residual_share(self, config: PretrainedConfig) -> float | None:
        """Return 1."""
        return 1.0

    def sublayers(self, config: PretrainedConfig) -> Mapping[str, Sublayer]:
        """Return attention and MLP, each with the norm before it; in parallel or not."""
        return {
            "attention": Sublayer(
                {"attention": "attention", "input_layernorm": "identity"},
                ("attention.dense.weight", "attention.dense.bias"),
            ),
            "mlp": Sublayer(
                {"mlp": "zero", "post_attention_layernorm": "identity"},
                ("mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"),
            ),
        }

    def subnet_config(
        self,
        config: PretrainedConfig,
        kept_layers: Sequence[int],
        units: Mapping[str, int],
        biased: frozenset[str] = frozenset(),
    ) -> PretrainedConfig:
        """Keep the class, with fewer layers and neurons; the MLP has biases anyway."""
        subnet = copy_config(config)
        subnet.intermediate_size = units["mlp"]
        self.set_depth(subnet, kept_layers, config)
        return subnet


class OPT(ArchitectureAdapter):
    """OPT, with or without projections around the decoder."""

    model_types = ("opt",)
    final_norm = "final_layer_norm"

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return ``model.model.decoder``."""
        return model.get_submodule("model.decoder")

    def channel_groups(self, config: PretrainedConfig) -> tuple[ChannelGroup, ...]:
        """Return the MLP group (units: neurons)."""
        return (ChannelGroup("mlp", config.ffn_dim, (ChannelAxis("fc1", 1),), ChannelAxis("fc2", 1)),)

    def residual_share(self, config: PretrainedConfig) -> float | None:
        """Return 1; ``None`` for OPT-350m, which has norms on the residual stream."""
        return 1.0 if config.do_layer_norm_before else None

    def sublayers(self, config: PretrainedConfig) -> Mapping[str, Sublayer]:
        """Return attention and MLP; norms of OPT-350m are on the residual stream, and stay."""
        attention = {"self_attn": "attention"}
        mlp = {"fc1": "identity", "fc2": "zero"}
        if config.do_layer_norm_before:
            attention["self_attn_layer_norm"] = mlp["final_layer_norm"] = "identity"
        return {
            "attention": Sublayer(attention, ("self_attn.out_proj.weight", "self_attn.out_proj.bias")),
            "mlp": Sublayer(mlp, ("fc2.weight", "fc2.bias")),
        }

    def subnet_config(
        self,
        config: PretrainedConfig,
        kept_layers: Sequence[int],
        units: Mapping[str, int],
        biased: frozenset[str] = frozenset(),
    ) -> PretrainedConfig:
        """Keep the class, with fewer layers and neurons."""
        subnet = copy_config(config)
        subnet.ffn_dim = units["mlp"]
        subnet.enable_bias = config.enable_bias or bool(biased)
        self.set_depth(subnet, kept_layers, config)
        return subnet
