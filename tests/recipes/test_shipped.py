"""The shipped recipes fit the models they name, and explain every field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.recipes.files import find_recipe, shipped_recipes
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import config_of

SHIPPED = shipped_recipes()
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
    plan_recipe(SHIPPED[name]).against(MODELS[name])


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
