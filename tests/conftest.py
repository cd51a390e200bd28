"""Tiny models with nothing left at zero or one: defaults hide wrong indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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


def make_random_batches(
    count: int = 3, rows: int = 2, positions: int = 12, seed: int = 0, lengths: Sequence[int] = ()
) -> list[dict[str, Tensor]]:
    """Return complete batches of random tokens.

    ``lengths`` are those of the rows of every batch, padded on the right; default: all ``positions``.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, positions, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, positions), generator=generator)
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids * mask, "attention_mask": mask.clone(), "labels": labels})
    return batches


@pytest.fixture
def fresh_session() -> Iterator[None]:
    """Let no recipe of another test be left in llm-compressor's session, nor one of this test."""
    from llmcompressor.core import reset_session  # seconds, which most tests do not need

    reset_session()
    yield
    reset_session()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(model_type, seed=0, layers=4, **overrides)``: see :func:`make_tiny_model`."""
    return make_tiny_model


@pytest.fixture(scope="session")
def random_batches() -> Callable[..., list[dict[str, Tensor]]]:
    """``random_batches(count=3, rows=2, positions=12, seed=0, lengths=())``: see :func:`make_random_batches`."""
    return make_random_batches
