"""Recipes against a model's sizes: what cannot be cut or quantized is refused before it loads."""

from __future__ import annotations

import pytest
from transformers import GPT2Config

from amoeba_plugin.elastic.subnet_config import is_per_layer
from amoeba_plugin.errors import AmoebaError, ArchitectureError, RecipeError, ShapeError
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import GOOD, config_of, grouped


def test_a_recipe_that_fits_passes():
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        plan_recipe(GOOD).against(config_of(model_type))


def test_an_unsupported_architecture_names_the_supported_ones():
    with pytest.raises(ArchitectureError, match="'gpt2' is not supported; supported are gemma2, .*llama, .*qwen2, "):
        plan_recipe(GOOD).against(GPT2Config())


def test_a_quantized_model_is_refused():
    config = config_of()
    config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ArchitectureError, match="already quantized"):
        plan_recipe(GOOD).against(config)


@pytest.mark.parametrize(
    ("kept", "shape", "message"),
    [
        ('{"2": [0, 3]}', "3x3/4", r"shape 3x3/4 is outside the space: kept_layers has depths 2, 4; .*add \"3\""),
        ("{2: [0, 3]}", "2.5x3/4", "shape 2.5x3/4 is outside the space: kept_layers has depths 2, 4"),
        ("{3: [0, 1, 7]}", "3x3/4", r"kept_layers: depth 3 keeps \[0, 1, 7\]"),
        ("{2.5: [0, 1, 2.mlp], 2: [0, 7]}", "2.5x3/4", r"kept_layers: depth 2 keeps \[0, 7\]"),
    ],
)
def test_layers_given_must_be_the_models_and_hold_the_shape(kept: str, shape: str, message: str):
    text = GOOD.replace("min_depth: 2", f"min_depth: 2, kept_layers: {kept}").replace("3x3/4", shape)
    with pytest.raises(AmoebaError, match=message):
        plan_recipe(text).against(config_of())
    fits = GOOD.replace("min_depth: 2", "min_depth: 2, kept_layers: {2.5: [0, 2.mlp, 3]}").replace("3x3/4", "2.5x3/4")
    assert is_per_layer(plan_recipe(fits).against(config_of()).subnet)


@pytest.mark.parametrize("layers", [1, 2])
def test_min_depth_must_be_below_the_number_of_layers(layers: int):
    with pytest.raises(RecipeError, match=f"min_depth 2 of a model with {layers} layers"):
        plan_recipe(GOOD).against(config_of(num_hidden_layers=layers))


def test_a_sampled_shape_deeper_than_the_model_is_refused():
    recipe = plan_recipe(GOOD.replace("max_steps: 2", "max_steps: 2, sampled_shapes: [4x3/4, 5x3/4]"))
    with pytest.raises(ShapeError, match="shape 5x3/4 is outside the space: .* depths 2 to 4"):
        recipe.against(config_of())


def test_a_shape_deeper_than_the_model_is_refused():
    with pytest.raises(ShapeError, match="depths 2 to 4"):
        plan_recipe(GOOD.replace("3x3/4", "5x3/4")).against(config_of())


def test_a_width_that_rounding_leaves_nothing_of_is_refused():
    text = GOOD.replace('["1", "3/4"]', '["1", "3/4", "1/8"], round_to: {attention: 64}')
    with pytest.raises(RecipeError, match="width 1/8"):
        plan_recipe(text).against(config_of())


def test_anchors_must_be_layers_of_the_model():
    text = GOOD.replace('["1", "3/4"]', '["1", "3/4"], anchor_layers: [1, 9]')
    with pytest.raises(RecipeError, match=r"anchor_layers \[1, 9\] are impossible: the model has layers 0\.\.3"):
        plan_recipe(text).against(config_of())


@pytest.mark.parametrize("uneven", ["allocation: global", "anchor_layers: 1"])
def test_layers_of_different_sizes_are_checked_at_the_least_they_may_keep(uneven: str):
    def text(round_to: str, size: int) -> str:
        return grouped(size).replace('["1", "3/4"]', f'["1", "3/4"], {uneven}, round_to: {round_to}')

    plan_recipe(text("32", 32)).against(config_of())
    with pytest.raises(RecipeError, match=r"groups of 32 .*down_proj"):
        plan_recipe(text("{attention: 32, mlp: 40}", 32)).against(config_of())
    assert is_per_layer(plan_recipe(text("32", 32)).against(config_of()).subnet)
    portable = text("32", 32).replace("{shape: 3x3/4}", "{shape: 3x3/4, portable: true}")
    assert not is_per_layer(plan_recipe(portable).against(config_of()).subnet)


def test_splits_that_are_not_measured_yet_are_checked_at_the_least_they_may_keep():
    text = grouped(32).replace('["1", "3/4"]', '["1", "3/4"], allocation: measured, round_to: {attention: 32, mlp: 40}')
    with pytest.raises(RecipeError, match=r"groups of 32 .*down_proj"):
        plan_recipe(text).against(config_of())
    possible = text.replace("mlp: 40", "mlp: 32")
    plan_recipe(possible).against(config_of())
    assert not is_per_layer(plan_recipe(possible).against(config_of()).subnet)


def test_a_group_size_must_divide_the_subnets_inputs():
    def text(size: int) -> str:
        return grouped(size).replace('["1", "3/4"]', '["1", "3/4"], allocation: uniform')

    plan_recipe(text(32)).against(config_of())  # 3 KV groups: 96 inputs of o_proj, 96 of down_proj
    with pytest.raises(
        RecipeError, match=r"groups of 64 .*o_proj \(96 inputs\), down_proj \(96 inputs\).*group_size to 32"
    ):
        plan_recipe(text(64)).against(config_of())
    any_of = r"o_proj \(any multiple of 32 inputs\), down_proj \(any multiple of 1 inputs\)"
    with pytest.raises(RecipeError, match=any_of):
        plan_recipe(grouped(64)).against(config_of())


def test_a_presets_group_size_is_resolved():
    text = GOOD.replace("scheme: W8A8", "scheme: W4A16")
    with pytest.raises(RecipeError, match="groups of 128 input channels"):
        plan_recipe(text).against(config_of())
    ignored = text.replace("[lm_head]", "[lm_head, 're:.*(q|k|v|o|gate|up|down)_proj']")
    plan_recipe(ignored).against(config_of())


def test_bias_compensation_without_a_class_to_hold_it_is_refused():
    recipe = plan_recipe(GOOD.replace('["1", "3/4"]', '["1", "3/4"], bias_compensation: true'))
    recipe.against(config_of("llama"))
    with pytest.raises(ArchitectureError, match="qwen3"):
        recipe.against(config_of("qwen3"))
