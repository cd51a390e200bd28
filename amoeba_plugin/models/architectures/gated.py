"""Decoders with grouped-query attention and a gated MLP, each of separate projections, named as in Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PretrainedConfig

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelAxis, ChannelGroup, copy_config
from amoeba_plugin.models.sublayers import Sublayer


class GatedDecoder(ArchitectureAdapter):
    """Names and sizes that most decoders of today share; the unit of attention is a KV group with its query heads.

    Attributes:
        attention_norms: Norms before and after attention that nothing else uses, all off the residual stream.
        mlp_norms: Those of the MLP.
    """

    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return ``model.model``."""
        decoder = model.model
        if not isinstance(decoder, nn.Module):
            raise ArchitectureError(f"{type(model).__name__}.model is no module")
        return decoder

    def channel_groups(self, config: PretrainedConfig) -> tuple[ChannelGroup, ...]:
        """Return the attention group (units: KV groups) and the MLP group (units: neurons)."""
        query_rows, head_dim = queries_per_unit(config) * head_size(config), head_size(config)
        attention = ChannelGroup(
            "attention",
            config.num_key_value_heads,
            (
                ChannelAxis("self_attn.q_proj", query_rows),
                ChannelAxis("self_attn.k_proj", head_dim),
                ChannelAxis("self_attn.v_proj", head_dim),
            ),
            ChannelAxis("self_attn.o_proj", query_rows),
        )
        mlp = ChannelGroup(
            "mlp",
            config.intermediate_size,
            (ChannelAxis("mlp.gate_proj", 1), ChannelAxis("mlp.up_proj", 1)),
            ChannelAxis("mlp.down_proj", 1),
        )
        return attention, mlp

    def sublayers(self, config: PretrainedConfig) -> Mapping[str, Sublayer]:
        """Return attention and MLP with the norms that are theirs."""
        return {
            "attention": Sublayer(
                {"self_attn": "attention", **dict.fromkeys(self.attention_norms, "identity")},
                ("self_attn.o_proj.weight", "self_attn.o_proj.bias"),
            ),
            "mlp": Sublayer(
                {"mlp": "zero", **dict.fromkeys(self.mlp_norms, "identity")},
                ("mlp.down_proj.weight", "mlp.down_proj.bias"),
            ),
        }

    def residual_share(self, config: PretrainedConfig) -> float | None:
        """Return 1, or Granite's multiplier; ``None`` where norms behind the MLP are its own."""
        plain = self.mlp_norms == GatedDecoder.mlp_norms
        return float(getattr(config, "residual_multiplier", 1.0)) if plain else None

    def subnet_config(
        self,
        config: PretrainedConfig,
        kept_layers: Sequence[int],
        units: Mapping[str, int],
        biased: frozenset[str] = frozenset(),
    ) -> PretrainedConfig:
        """Keep the model's class, with fewer layers, heads and neurons."""
        subnet = self.resized(config, kept_layers, units)
        if biased:
            self.allow_biases(subnet)
        return subnet

    def resized(
        self, config: PretrainedConfig, kept_layers: Sequence[int], units: Mapping[str, int]
    ) -> PretrainedConfig:
        """Return a copy of a configuration with the subnet's sizes."""
        subnet = copy_config(config)
        # Many files leave head_dim to hidden_size // heads, which is wrong once heads are gone.
        subnet.head_dim = head_size(config)
        subnet.num_key_value_heads = units["attention"]
        subnet.num_attention_heads = units["attention"] * queries_per_unit(config)
        subnet.intermediate_size = units["mlp"]
        self.set_depth(subnet, kept_layers, config)
        return subnet

    def allow_biases(self, subnet: PretrainedConfig) -> None:
        """Make room for output biases on both consumers; to be overridden where the class has any.

        Raises:
            ArchitectureError: If it has none.
        """
        raise ArchitectureError(
            f"bias compensation on {subnet.model_type}: neither its class nor an identical one has a bias on both "
            "attention's output and down_proj; set bias_compensation: false in WidthShrinkingModifier"
        )


def head_size(config: PretrainedConfig) -> int:
    """Return the channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def queries_per_unit(config: PretrainedConfig) -> int:
    """Return the query heads of one KV group."""
    return int(config.num_attention_heads // config.num_key_value_heads)


def require_divisible_hidden(subnet: PretrainedConfig, whole: PretrainedConfig) -> None:
    """Refuse what the class would refuse when it is loaded, though it has a ``head_dim`` of its own.

    Raises:
        ArchitectureError: If the heads kept do not divide the hidden size; it names those that do.
    """
    if subnet.hidden_size % subnet.num_attention_heads:
        step = queries_per_unit(whole)
        heads = range(step, whole.num_attention_heads + 1, step)
        possible = ", ".join(str(count) for count in heads if subnet.hidden_size % count == 0)
        raise ArchitectureError(
            f"{subnet.model_type} with {subnet.num_attention_heads} heads on hidden size {subnet.hidden_size}: its "
            f"class wants heads that divide the hidden size; possible are {possible}. Set round_to for attention in "
            f"WidthShrinkingModifier so that only these come out (a head has {head_size(whole)} channels)"
        )
