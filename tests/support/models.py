"""Tiny models with nothing left at zero or one, for defaults hide wrong indices; plain, elastic, adapted, offloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.testing.random_models import random_repairs, random_strategy

VOCABULARY = 97

# 8 heads of 16 channels are 128 channels, and hidden is 64: what confuses the two fails.
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_tiny_model(model_type: str, seed: int = 0, layers: int = 4, **overrides: Any) -> PreTrainedModel:
    """Return a random causal LM of one architecture, fp32, in evaluation mode; the same seed gives the same weights."""
    config = AutoConfig.for_model(model_type, **(SIZES | {"num_hidden_layers": layers} | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norm weights are made ones, biases zeros
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                else:  # std 0.02 would leave every layer next to the identity
                    parameter.mul_(4)
    return model.eval()


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


def random_elastic(
    model: PreTrainedModel, seed: int = 0, bias_compensation: bool = False, repaired: bool = False
) -> ElasticModel:
    """Make a four-layer model elastic with a random strategy, on request with random repaired weights."""
    strategy = random_strategy(model, seed, bias_compensation)
    if repaired:
        strategy = replace(strategy, repairs=random_repairs(model, strategy))
    return ElasticModel(model, strategy)


def offloaded(model: PreTrainedModel, where: str, folder: Path) -> PreTrainedModel:
    """Let accelerate offload all weights to the "cpu" or "disk"; return the model."""
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def save_base(model: PreTrainedModel, directory: Path) -> Path:
    """Save a model of 97 tokens with a tokenizer of as many words; return the directory."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w1")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def random_tokens(vocabulary: int = VOCABULARY, positions: int = 12) -> Tensor:
    """Return (2, positions) tokens, none of them special; the same at every call."""
    return torch.randint(3, vocabulary, (2, positions), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    """Return a model's logits without a cache, by default of random tokens of its vocabulary."""
    if tokens is None:
        tokens = random_tokens(model.config.vocab_size)
    found: Tensor = model(tokens, use_cache=False).logits
    return found


def require_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Require that nothing differs by more than a tolerance."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def logits_at(elastic: ElasticModel, shape: object, tokens: Tensor | None = None) -> Tensor:
    """Return the logits of one shape."""
    with elastic.active(str(shape)) as model:
        return logits(model, tokens)
