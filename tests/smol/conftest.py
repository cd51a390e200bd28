"""Tiny models with nothing left at zero or one: defaults hide wrong indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from amoeba_plugin.smol import SmolConfig

VOCABULARY = 50
LAYERS = 4
DEPTHS = [2, 3, 4]
WIDTHS = ["1", "3/4", "1/2"]


@pytest.fixture
def randomize() -> Callable[..., None]:
    def randomize(model: nn.Module, seed: int = 1, only: str = "") -> None:
        """Add normal noise to every parameter whose name contains ``only``."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if only in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)

    return randomize


@pytest.fixture
def base_model(randomize: Callable[..., None]) -> Callable[..., LlamaForCausalLM]:
    def base_model(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
        settings = dict(num_hidden_layers=LAYERS, vocab_size=VOCABULARY, attention_bias=True, tie_word_embeddings=False)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | settings | changes)))
        randomize(model)
        return model.eval()

    return base_model


@pytest.fixture
def smol_config() -> Callable[..., SmolConfig]:
    def smol_config(**changes: Any) -> SmolConfig:
        space = dict(depths=DEPTHS, widths=WIDTHS, kept_layers={"3": [0, 1, 3], "2": [1, 2]})
        settings = dict(r=3, lora_alpha=5, num_experts=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return SmolConfig(**(space | settings | changes))

    return smol_config


@pytest.fixture
def smol_model(
    base_model: Callable[..., LlamaForCausalLM],
    smol_config: Callable[..., SmolConfig],
    randomize: Callable[..., None],
) -> Callable[..., PeftModel]:
    def smol_model(**changes: Any) -> PeftModel:
        """A randomized SMOL model on a randomized base, in evaluation mode."""
        model = get_peft_model(base_model(), smol_config(**changes))
        randomize(model, seed=2, only="smol_")
        return model.eval()

    return smol_model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
