"""Exits against stock models of so many layers, in every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.errors import ArchitectureError, ShapeError
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.testing.random_models import random_model
from amoeba_plugin.training.layer_tuning.exits import Exits, attach_exits, require_depths
from support.architectures import CONFIGS, VARIANTS
from support.models import logits, require_close, tiny_llama

TOKENS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(5))
KINDS = CONFIGS | {"gpt_neox in sequence": VARIANTS["gpt_neox in sequence"]}


def with_random_norms(model: PreTrainedModel, depths: list[int]) -> Exits:
    exits = Exits(model, depths, stacked=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for depth in depths:
            for value in exits.norm(depth).parameters():
                value.add_(torch.rand_like(value))
    return exits


def stock(model: PreTrainedModel, depth: int, norm: nn.Module) -> PreTrainedModel:
    """Return a model of the stock class that has the first layers of another, and a norm of its own behind them."""
    adapter, config = architecture_of(model.config), copy.deepcopy(model.config)
    config.num_hidden_layers = depth
    for name in (*adapter.per_layer_fields, "no_rope_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(config, name)[:depth])
    found = AutoModelForCausalLM.from_config(config).eval()
    found.load_state_dict(model.state_dict(), strict=False)
    getattr(adapter.decoder(found), adapter.final_norm).load_state_dict(norm.state_dict())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_exit_computes_what_a_stock_model_of_so_many_layers_does(kind: str):
    model = random_model(KINDS[kind])
    whole = logits(model)
    exits = with_random_norms(model, [1, 3])
    tokens = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(5))
    expected = {depth: logits(stock(model, depth, exits.norm(depth)), tokens) for depth in exits.depths}
    with torch.no_grad():
        states, in_tuples = exits.states({"input_ids": tokens}, [1, 2, 3])
    for depth in exits.depths:
        with exits.active(depth) as stopped:
            require_close(logits(stopped, tokens), expected[depth])
        for first in range(1, depth + 1):  # of the same states, with no adapter
            with exits.resumed(depth, first, states[first - 1], in_tuples) as stopped:
                require_close(logits(stopped, tokens), expected[depth])
    require_close(logits(model), whole, 0)  # and it is whole afterwards
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("kind", ["lora", "smol"])
@pytest.mark.parametrize("stacked", [False, True])
def test_layers_below_a_branch_compute_as_the_base(kind: str, stacked: bool):
    exits = Exits(tiny_llama(), [1, 3, 4], stacked)
    fields = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": exits.modules_to_save}
    config = (LoraConfig(r=2, init_lora_weights=False, **fields) if kind == "lora"
              else SmolConfig(r=2, num_experts=2, init_weights=False, **fields))  # fmt: skip
    model = get_peft_model(exits.model, config).eval()
    whole, tokens = logits(model, TOKENS), {"input_ids": TOKENS}
    with torch.no_grad():
        begun = exits.begun(tokens)
    assert [None if each is None else each.first for each in begun] == ([1, 3, 4] if stacked else [None, 1, 3])
    for depth, each in zip(exits.depths, begun, strict=True):
        twin = copy.deepcopy(model)
        for layer in twin.get_base_model().model.layers[: exits.branch(depth)]:
            for name, module in list(layer.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    layer.set_submodule(name, module.get_base_layer())
        twin.get_base_model().model.layers = twin.get_base_model().model.layers[:depth]
        twin.get_base_model().model.norm = exits.norm(depth)
        expected = logits(twin, TOKENS)
        with exits.active(depth):
            require_close(logits(model, TOKENS), expected)
        with exits.going_on(depth, each):
            require_close(logits(model, TOKENS), expected)
    require_close(logits(model, TOKENS), whole, 0)  # all of the adapter is on again
    assert all(value.requires_grad for name, value in model.named_parameters() if "lora_A.default" in name)


def test_exits_generate_with_a_cache():
    model = tiny_llama()
    exits = with_random_norms(model, [2])
    tokens = torch.tensor([[5, 9, 11]])
    alone = stock(model, 2, exits.norm(2))
    with exits.active(2) as stopped:
        found = stopped.generate(
            tokens, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    expected = alone.generate(
        tokens, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    require_close(torch.cat(found.logits), torch.cat(expected.logits))


def test_norms_are_those_of_the_adapter_that_saves_them():
    exits = attach_exits(tiny_llama(), [1, 4])
    peft_model = get_peft_model(
        exits.model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=exits.modules_to_save)
    )
    assert exits.modules_to_save == ["branch_norms.1"]
    trained = {name for name, value in peft_model.named_parameters() if value.requires_grad and "lora" not in name}
    assert trained == {"base_model.model.branch_norms.1.modules_to_save.default.weight"}
    assert attach_exits(peft_model, [4, 1]).norm(1) is exits.norm(1)  # found again, not made anew


def test_a_model_without_a_norm_behind_its_layers_is_refused():
    with pytest.raises(ArchitectureError, match="has no norm behind its last layer"):
        Exits(random_model(VARIANTS["opt, narrow embeddings"]), [2])


@given(depths=st.lists(st.integers(-1, 6)), layers=st.integers(1, 5))
def test_depths_are_different_layers_of_the_model(depths: list[int], layers: int):
    possible = 0 < len(depths) == len({*depths} & {*range(1, layers + 1)})
    if possible:
        assert require_depths(depths, layers) == tuple(sorted(depths))
    else:
        with pytest.raises(ShapeError, match=f"from 1 to {layers}"):
            require_depths(depths, layers)
