"""Stock causal LMs whose decoder layers have sizes of their own; this file travels with the checkpoints that need it.

``config.per_layer_config`` (transformers) names what differs from layer to layer, for example
``{"3": {"num_attention_heads": 20, "num_key_value_heads": 5, "intermediate_size": 9216}}``. transformers reads that
into one configuration per layer; the classes here build every stock layer from its own. Nothing else differs from the
stock classes: no ``forward`` is overridden. Load with
``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)``.

It imports nothing but transformers, so that a checkpoint needs nothing else.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPTNeoXForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    OPTForCausalLM,
    PretrainedConfig,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SeedOssForCausalLM,
    SmolLM3ForCausalLM,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Stock
else:
    _Stock = object


class PerLayerSizes(_Stock):
    """Builds the stock model, then every layer anew from the configuration that is its own."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        # Heads, keys and neurons are read from the layers' configurations; who asks the model's gets the largest.
        config.allow_global_per_layer_attribute_access = True
        alike = copy.deepcopy(config)
        alike.per_layer_config = None
        super().__init__(alike, *args, **kwargs)
        config._attn_implementation = alike._attn_implementation
        decoder: Any = self.get_decoder()  # type: ignore[no-untyped-call]
        for index, layer in enumerate(decoder.layers):
            decoder.layers[index] = type(layer)(config.per_layer_config[index], index)
        for module in self.modules():  # one configuration for all, or set_attn_implementation would not reach a layer
            if hasattr(module, "config"):
                vars(module)["config"] = config
        self.post_init()  # type: ignore[no-untyped-call]


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


for _class in PerLayerSizes.__subclasses__():  # saving a model of these classes saves this file beside it
    _class.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]
