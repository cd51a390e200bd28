"""The configuration that a recipe's subnet will have, where layers differ in size."""

from __future__ import annotations

import pytest

from amoeba_plugin.elastic.subnet_config import is_per_layer
from amoeba_plugin.errors import ArchitectureError, RecipeError
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import GOOD, config_of, grouped


def test_a_subnet_whose_layers_differ_is_no_model_to_begin_with():
    subnet = plan_recipe(GOOD.replace('["1", "3/4"]', '["1", "3/4"], allocation: global')).against(config_of()).subnet
    assert is_per_layer(subnet)
    with pytest.raises(ArchitectureError, match="per_layer_config.*give the model that it was cut from"):
        plan_recipe(GOOD).against(subnet)


@pytest.mark.parametrize("anchors", ["1", "[3]"])
def test_layers_padded_for_any_loader_are_as_wide_as_the_anchors(anchors: str):
    text = grouped(32).replace('["1", "3/4"]', f'["1", "3/4"], anchor_layers: {anchors}')
    # others keep 2 groups and 85 neurons
    with pytest.raises(RecipeError, match=r"groups of 32 .*down_proj"):
        plan_recipe(text).against(config_of())
    portable = plan_recipe(text.replace("{shape: 3x3/4}", "{shape: 3x3/4, portable: true}"))
    portable.against(config_of())
    padded = portable.against(config_of()).subnet
    assert (padded.num_attention_heads, padded.intermediate_size) == (8, 128)


def test_anchors_that_the_layers_given_leave_out_are_not_waited_for():
    given = "min_depth: 2, kept_layers: {3: [0, 1, 2], 2: [0, 3]}"
    text = GOOD.replace("min_depth: 2", given).replace(
        '["1", "3/4"]', '["1", "3/4"], anchor_layers: [3], allocation: uniform'
    )
    without = plan_recipe(text).against(config_of()).subnet
    assert not is_per_layer(without)
    assert without.intermediate_size == 85  # 128 * (3/4 * 4 - 1) / 3
    both = plan_recipe(text.replace("3x3/4", "2x3/4")).against(config_of()).subnet
    assert [each.intermediate_size for each in both.per_layer_config] == [85, 128]
