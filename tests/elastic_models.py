"""Elastic models with random strategies, for tests of everything that switches shapes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.testing.architectures import KEPT, WIDTHS, random_strategy

__all__ = ["KEPT", "WIDTHS", "random_elastic", "random_strategy", "tiny_llama"]


def random_elastic(model: PreTrainedModel, seed: int = 0, bias_compensation: bool = False) -> ElasticModel:
    """Make a four-layer model elastic with a random strategy."""
    return ElasticModel(model, random_strategy(model, seed, bias_compensation))


def tiny_llama(seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return a four-layer Llama with 4 KV groups and 61 tokens, its norms random, in evaluation mode."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.3,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**fields | config))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()
