"""Stock causal LMs whose decoder layers have sizes of their own, or lack attention or MLP; this file travels with the
checkpoints that need it.

``config.per_layer_config`` (transformers) names what differs from layer to layer, for example
``{"3": {"num_attention_heads": 20, "num_key_value_heads": 5, "intermediate_size": 9216}}``. transformers reads that
into one configuration per layer; the classes here build every stock layer from its own. Of a layer whose entry says
``"skip": ["attention"]`` (or ``"mlp"``) the modules that ``config.stand_ins`` names are exchanged for what adds zero to
the residual stream and computes nothing. Nothing else differs from the stock classes: no ``forward`` of theirs is
overridden. Load with ``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)``.

It imports nothing but torch and transformers, so that a checkpoint needs nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPTNeoXForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Olmo2ForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PretrainedConfig,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    SeedOssForCausalLM,
    SmolLM3ForCausalLM,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Stock
else:
    _Stock = object


#: What layers call the cache: the first since transformers 5.24, the second before, the third in GPT-NeoX.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


class NoAttention(nn.Module):
    """In place of an attention that is gone: adds zero, and lets the cache count tokens as at every other layer."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        """Return zeros, (batch, positions, hidden) without memory of their own, and no attention weights."""
        cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
        if cache is not None:  # the model asks the first layer how many tokens it has seen: one channel counts them
            tokens = hidden_states[:, None, :, :1]
            cache.update(tokens, tokens, self.layer_idx)
        return hidden_states.new_zeros(()).expand_as(hidden_states), None


class NoOutput(nn.Module):
    """In place of an MLP, or of the linear that ends it: adds zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros, (..., hidden) without memory of their own."""
        return hidden_states.new_zeros(()).expand_as(hidden_states)


#: Makes what takes a module's place, given the layer's index. "identity" is for norms and linears on the way.
STAND_INS: dict[str, Callable[[int], nn.Module]] = {
    "attention": NoAttention,
    "zero": lambda _: NoOutput(),
    "identity": lambda _: nn.Identity(),
}


class _OwnFields:
    """A model's configuration as one module sees it: some fields are its layer's, all else is the model's, live."""

    def __init__(self, whole: PretrainedConfig, own: dict[str, Any]) -> None:
        vars(self).update(own)
        self.whole = whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "whole":  # while being copied there is nothing to ask yet
            raise AttributeError(name)
        return getattr(self.whole, name)


class PerLayerSizes(_Stock):
    """Builds the stock model, then every layer anew from the configuration that is its own.

    Attributes:
        own_fields: By path in a layer, the fields that a module goes on asking its configuration for.
    """

    own_fields: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        # Heads, keys and neurons are read from the layers' configurations; who asks the model's gets the largest.
        config.allow_global_per_layer_attribute_access = True
        alike = copy.deepcopy(config)
        alike.per_layer_config = None
        super().__init__(alike, *args, **kwargs)
        config._attn_implementation = alike._attn_implementation
        config._experts_implementation = alike._experts_implementation
        decoder: Any = self.get_decoder()  # type: ignore[no-untyped-call]
        for index, layer in enumerate(decoder.layers):
            own = config.per_layer_config[index]
            decoder.layers[index] = type(layer)(own, index)
            for part in getattr(own, "skip", None) or ():
                for path, kind in config.stand_ins[part].items():
                    decoder.layers[index].set_submodule(path, STAND_INS[kind](index))
        for module in self.modules():  # one configuration for all, or set_attn_implementation would not reach a layer
            if hasattr(module, "config"):
                vars(module)["config"] = config
        for layer, own in zip(decoder.layers, config.per_layer_config, strict=True):
            modules: dict[str, Any] = dict(layer.named_modules())
            for path in self.own_fields.keys() & modules.keys():
                if hasattr(modules[path], "config"):  # what took the place of one that is gone has none
                    fields = {name: getattr(own, name) for name in self.own_fields[path]}
                    vars(modules[path])["config"] = _OwnFields(config, fields)
        self.post_init()  # type: ignore[no-untyped-call]

    # transformers looks for words in the file of a class, which is this one; the stock class knows

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls._stock_class()._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls._stock_class()._can_set_experts_implementation())

    @classmethod
    def _stock_class(cls) -> Any:
        return cls.__mro__[cls.__mro__.index(PerLayerSizes) + 1]


class PerLayerLlamaForCausalLM(PerLayerSizes, LlamaForCausalLM):
    """``LlamaForCausalLM``, one size per layer."""


class PerLayerMistralForCausalLM(PerLayerSizes, MistralForCausalLM):
    """``MistralForCausalLM``, one size per layer."""


class PerLayerQwen2ForCausalLM(PerLayerSizes, Qwen2ForCausalLM):
    """``Qwen2ForCausalLM``, one size per layer."""


class PerLayerQwen3ForCausalLM(PerLayerSizes, Qwen3ForCausalLM):
    """``Qwen3ForCausalLM``, one size per layer."""


class PerLayerSeedOssForCausalLM(PerLayerSizes, SeedOssForCausalLM):
    """``SeedOssForCausalLM``, one size per layer."""


class PerLayerGemma2ForCausalLM(PerLayerSizes, Gemma2ForCausalLM):
    """``Gemma2ForCausalLM``, one size per layer."""


class PerLayerGemma3ForCausalLM(PerLayerSizes, Gemma3ForCausalLM):
    """``Gemma3ForCausalLM``, one size per layer."""


class PerLayerGPTNeoXForCausalLM(PerLayerSizes, GPTNeoXForCausalLM):
    """``GPTNeoXForCausalLM``, one size per layer."""


class PerLayerGraniteForCausalLM(PerLayerSizes, GraniteForCausalLM):
    """``GraniteForCausalLM``, one size per layer."""


class PerLayerOPTForCausalLM(PerLayerSizes, OPTForCausalLM):
    """``OPTForCausalLM``, one size per layer."""


class PerLayerOlmo2ForCausalLM(PerLayerSizes, Olmo2ForCausalLM):
    """``Olmo2ForCausalLM``, one size per layer."""


class PerLayerSmolLM3ForCausalLM(PerLayerSizes, SmolLM3ForCausalLM):
    """``SmolLM3ForCausalLM``, one size per layer."""


class PerLayerPhi3ForCausalLM(PerLayerSizes, Phi3ForCausalLM):
    """``Phi3ForCausalLM``, one size per layer."""

    # of all stock classes the only one whose attention counts heads by the configuration while it runs
    own_fields: ClassVar = {"self_attn": ("num_attention_heads",)}


class PerLayerMixtralForCausalLM(PerLayerSizes, MixtralForCausalLM):
    """``MixtralForCausalLM``, one size per layer, the same for all its experts."""

    # llm-compressor asks the experts' configuration how many neurons they have
    own_fields: ClassVar = {"mlp.experts": ("intermediate_size",)}


class PerLayerQwen3MoeForCausalLM(PerLayerSizes, Qwen3MoeForCausalLM):
    """``Qwen3MoeForCausalLM``, one size per layer, the same for all its experts."""

    own_fields: ClassVar = {"mlp.experts": ("moe_intermediate_size",)}


for _class in PerLayerSizes.__subclasses__():  # saving a model of these classes saves this file beside it
    _class.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]
