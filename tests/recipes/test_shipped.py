"""The shipped recipes fit the models they name, and explain every field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.recipes.files import find_recipe, shipped_recipes
from amoeba_plugin.recipes.notes import notes
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import config_of

SHIPPED = shipped_recipes()
SMALL = {"head_dim": 64}
SMOLLM2 = config_of(
    num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, **SMALL
)
MODELS = {
    "demo": config_of(
        num_hidden_layers=12, hidden_size=128, num_attention_heads=16, num_key_value_heads=8, intermediate_size=512
    ),
    "llama2-7b": config_of(
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        intermediate_size=11008,
    ),
    "small-llama": SMOLLM2,
    "smollm2": SMOLLM2,
    "select_only": SMOLLM2,
    "mixed_bits": SMOLLM2,
    "edge_llm": SMOLLM2,
    "fit": SMOLLM2,
    "qwen3": config_of(
        "qwen3",
        num_hidden_layers=28,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=6144,
    ),
}


def test_an_unknown_name_lists_the_shipped_recipes():
    with pytest.raises(RecipeError, match="Did you mean 'qwen3'"):
        find_recipe("qwen")
    assert find_recipe("qwen3") == SHIPPED["qwen3"]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_recipe_fits_the_model_it_names(name: str):
    plan = plan_recipe(SHIPPED[name])
    assert not [note for note in notes(plan, plan.against(MODELS[name])) if "round_to" in note]


def test_the_recipe_of_small_llamas_fits_all_that_it_names():
    plan = plan_recipe(SHIPPED["small-llama"])
    for layers, hidden, heads, groups, neurons in ((32, 960, 15, 5, 2560), (22, 2048, 32, 4, 5632)):
        config = config_of(
            num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups,
            intermediate_size=neurons, **SMALL,
        )  # fmt: skip
        assert not notes(plan, plan.against(config))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_field_of_a_shipped_recipe_has_a_comment(name: str):
    lines = SHIPPED[name].read_text().splitlines()
    fields = [line for line in lines if line.startswith("      ") and ":" in line.partition("#")[0]]
    structure = ("adapter:", "weights:", "targets: [Linear]")  # their parts, or their parent, are commented
    assert fields
    assert [line for line in fields if "#" not in line and not line.strip().startswith(structure)] == []


def test_the_text_may_stand_for_the_file():
    make: Callable[[str], Any] = plan_recipe
    assert [type(each) for each in make(SHIPPED["demo"].read_text()).modifiers] == [
        type(each) for each in plan_recipe(SHIPPED["demo"]).modifiers
    ]
