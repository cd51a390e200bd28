"""Stand-ins for modules of the host take the cache under every name that the host has for it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache

from amoeba_plugin.models.modeling_per_layer import CACHE_NAMES, STAND_INS
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.runtime.compat import cache_name
from support.architectures import CONFIGS

STATES = torch.ones(2, 3, 8)


def test_the_names_are_those_of_all_versions():
    assert set(CACHE_NAMES) == {"cache", "past_key_values", "layer_past"}


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_an_attention_that_is_gone_counts_tokens_under_every_name(name: str):
    cache = DynamicCache()
    stand_in = STAND_INS["attention"](0)
    for calls in (1, 2):
        output, weights = stand_in(STATES, attention_mask=None, **{name: cache})
        assert cache.get_seq_length() == calls * STATES.shape[1], name
        assert weights is None
        assert output.shape == STATES.shape
        assert not output.any()
    others = {other: None for other in CACHE_NAMES if other != name}
    stand_in(hidden_states=STATES, **others, **{name: cache})
    assert cache.get_seq_length() == 3 * STATES.shape[1]


def test_without_a_cache_there_is_nothing_to_count():
    for arguments in ({}, dict.fromkeys(CACHE_NAMES)):
        output, _ = STAND_INS["attention"](0)(STATES, **arguments)
        assert not output.any()


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_host_calls_an_attention_with_one_of_these_names(model_type: str):
    """Contract: where a new version has yet another name, this fails, and not the decoding of a subnet."""
    fields = {name: value for name, value in CONFIGS[model_type].items() if name != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    layer = architecture_for(model_type).layers(model)[0]
    attention = next(module for name, module in layer.named_children() if "attn" in name or name == "attention")
    asked: list[str] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not [each for each in args if isinstance(each, Cache)], "by position: a stand-in takes it by name"
        asked.extend(name for name, value in kwargs.items() if isinstance(value, Cache))

    attention.register_forward_pre_hook(note, with_kwargs=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[3, 4]]), **{cache_name(model): cache}, use_cache=True)
    assert len(asked) == 1
    assert set(asked) <= set(CACHE_NAMES)
    assert cache_name(model) in inspect.signature(model.forward).parameters
