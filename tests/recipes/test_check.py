"""Recipes: what is refused, with which words, before anything loads; and that the shipped ones run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.recipes import GOOD, config_of, grouped, refusal
from transformers import GPT2Config

from amoeba_plugin.elastic.subnet_config import is_per_layer
from amoeba_plugin.errors import AmoebaError, ArchitectureError, RecipeError, ShapeError
from amoeba_plugin.recipes.files import find_recipe, shipped_recipes
from amoeba_plugin.recipes.read import plan_recipe

SHIPPED = shipped_recipes()


def test_a_good_recipe_gives_its_modifiers_in_order():
    recipe = plan_recipe(GOOD)
    assert [type(modifier).__name__ for modifier in recipe.modifiers] == [
        "DepthShrinkingModifier",
        "WidthShrinkingModifier",
        "OneForAllDistillationModifier",
        "SubnetExtractionModifier",
        "QuantizationModifier",
    ]
    assert recipe.depth.min_depth == 2
    assert recipe.extraction.group == "c"
    assert recipe.structural == recipe.modifiers[:4]
    assert [str(shape) for _, shape in recipe.shapes] == ["3x3/4"]
    assert recipe.where(recipe.width) == "<text>, line 5: WidthShrinkingModifier"
    assert recipe.needs_data


def test_a_recipe_of_the_host_alone_is_fine():
    recipe = plan_recipe("q_stage: {q_modifiers: {QuantizationModifier: {targets: [Linear], scheme: FP8_DYNAMIC}}}")
    assert not recipe.structural
    assert not recipe.needs_data


# What llm-compressor ignores in silence or stumbles over: (what is replaced, by what, what the message says).
BAD = {
    "stage suffix": ("select_stage:", "select:", ["line 2", "'select'", "_stage", "select_stage"]),
    "group suffix": ("  a_modifiers:", "  a:", ["line 3", "'a'", "_modifiers", "a_modifiers"]),
    "unknown modifier": ("DepthShrinkingModifier", "DepthShrinkModifier", ["Did you mean 'DepthShrinkingModifier'"]),
    "unknown field": ("min_depth", "mindepth", ["line 4", "'mindepth' is no field", "Did you mean 'min_depth'"]),
    "unknown nested field": ("{r: 4}", "{rank: 4, lora_alhpa: 1}", ["adapter", "'rank' is no field", "lora_alpha"]),
    "null fields": ("{shape: 3x3/4}", "", ["SubnetExtractionModifier", "nothing", "write {} for no fields"]),
    "list of modifiers": (
        "    SubnetExtractionModifier: {shape: 3x3/4}",
        "    - SubnetExtractionModifier: {shape: 3x3/4}",
        ["c_modifiers", "a list where a mapping belongs"],
    ),
    "list of fields": ("{shape: 3x3/4}", "[3x3/4]", ["SubnetExtractionModifier", "a list where a mapping belongs"]),
    "scalar group": ("{targets: [Linear], scheme: W8A8, ignore: [lm_head]}", "W8A8", ["'W8A8' where"]),
    "same group twice": ("  b_modifiers:", "  a_modifiers:", ["'a_modifiers'", "select_stage", "finetune_stage"]),
    "key given twice": ("{min_depth: 2}", "{min_depth: 2, min_depth: 3}", ["line 4", "'min_depth'", "given in line 4"]),
    "type twice in a group": (
        "    WidthShrinkingModifier",
        "    DepthShrinkingModifier: {min_depth: 3}\n    WidthShrinkingModifier",
        ["'DepthShrinkingModifier' was given in line 4"],
    ),
    "group as a field": ("{min_depth: 2}", "{min_depth: 2, group: x}", ["'group' is no field"]),
    "dead field": ("{min_depth: 2}", "{min_depth: 2, start: 1}", ["'start' has no effect"]),
    "missing field": ("{min_depth: 2}", "{}", ["min_depth must be given"]),
    "min_depth 0": ("{min_depth: 2}", "{min_depth: 0}", ["min_depth", "0", "greater than or equal to 1"]),
    "min_depth in words": ("{min_depth: 2}", "{min_depth: two}", ["min_depth", "'two'", "integer"]),
    "keep_last too large": ("{min_depth: 2}", "{min_depth: 2, keep_last: 3}", ["keep_last 3 of min_depth 2"]),
    "unknown objective": ("{min_depth: 2}", "{min_depth: 2, objective: los}", ["Did you mean 'loss'"]),
    "unknown importance": ('["1", "3/4"]', '["1"], importance: falp', ["Did you mean 'flap'"]),
    "width above 1": ('"3/4"]', '"9/8"]', ["9/8", "(0, 1]"]),
    "width 0": ('"3/4"]', "0]", ["width 0", "(0, 1]"]),
    "widths without 1": ('["1", "3/4"]', '["3/4"]', ["lack 1"]),
    "widths as a scalar": ('["1", "3/4"]', "3/4", ["is no list of shares"]),
    "no shape": ("3x3/4", "threequarters", ["'threequarters' is not a subnet shape", "24x7/8"]),
    "shape too shallow": ("3x3/4", "1x3/4", ["1x3/4 is outside the space", "min_depth 2"]),
    "shape of another width": ("3x3/4", "3x1/2", ["3x1/2 is outside the space", "1, 3/4"]),
    "unknown schedule": ("max_steps: 2", "max_steps: 2, lr_scheduler_type: cosin", ["Did you mean 'cosine'"]),
    "unknown loss": ("max_steps: 2", "max_steps: 2, loss: mse", ["loss 'mse'", "soft_cross_entropy"]),
    "more experts than there are": ("{r: 4}", "{r: 4, num_experts: 2, top_k: 3}", ["top_k 3"]),
    "learning rate 0": ("max_steps: 2", "max_steps: 2, learning_rate: 0", ["learning_rate", "greater than 0"]),
    "unknown scheme": ("W8A8", "W8A9", ["QuantizationModifier", "no scheme 'W8A9'", "Did you mean 'W8A8'", "W4A16"]),
    "adapter as a word": ("{r: 4}", "lora", ["adapter: 'lora' is not", "a mapping, {field: value}, or", "'none'"]),
    "unknown type of adapter": ("{r: 4}", "{type: qlora}", ["adapter.type: 'qlora' is not", "'smol' or 'lora'"]),
    "rank in words": ("{r: 4}", "{r: 2x}", ["adapter.r: '2x' is not possible (input should be a valid integer"]),
    "sampled shapes as a word": ("max_steps: 2", "max_steps: 2, sampled_shapes: al", ["a valid list, or", "'all'"]),
    "sampled shape outside": ("max_steps: 2", "max_steps: 2, sampled_shapes: [3x1/2]", ["3x1/2 is outside the space"]),
    "yes for a number": ("{min_depth: 2}", "{min_depth: yes}", ["min_depth: True is not possible, a number"]),
    "fields not indented": ("{min_depth: 2}", "", ["indent its fields below it"]),
    "times for an x": ("3x3/4", "3\N{MULTIPLICATION SIGN}3/4", ["DEPTHxWIDTH", "the letter x"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_run_is_refused_with_its_place_and_a_way_out(case: str):
    old, new, words = BAD[case]
    assert old in GOOD
    message = refusal(GOOD.replace(old, new, 1))
    for word in words:
        assert word in message
    for internal in ("literal[", "function-after", "base 10", "AdapterOptions"):
        assert internal not in message


@pytest.mark.parametrize(
    "text", ["\n", "# only a comment\n", "a_stage: {}\n", "a_stage: {a_modifiers: {}}\n", "[1, 2]\n: x", "a: [\n"]
)
def test_what_holds_no_modifier_is_refused(text: str):
    refusal(text)


def test_top_level_args_are_refused_because_nothing_reads_them():
    assert "'args'" in refusal("args: {lr: 1}\n" + GOOD)


STAGES = yaml.safe_load(GOOD)


@pytest.mark.parametrize(
    "order",
    [
        ["finetune_stage", "select_stage", "extract_stage", "quantize_stage"],
        ["select_stage", "extract_stage", "finetune_stage", "quantize_stage"],
        ["quantize_stage", "select_stage", "finetune_stage", "extract_stage"],
        ["select_stage", "finetune_stage", "quantize_stage", "extract_stage"],
        ["select_stage", "finetune_stage", "quantize_stage"],
        ["select_stage"],
    ],
    ids=" ".join,
)
def test_an_impossible_order_is_refused(order: list[str]):
    refusal(yaml.safe_dump({stage: STAGES[stage] for stage in order}, sort_keys=False))


def test_an_anchor_that_holds_itself_does_not_hang():
    refusal("a_stage: &a\n  b_modifiers: *a\n")


def test_python_objects_are_not_made():
    assert "plain data" in refusal(
        "a_stage: {a_modifiers: {DepthShrinkingModifier: {min_depth: !!python/name:os.system ''}}}"
    )


def test_a_file_is_named_in_the_message(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("min_depth", "mindepth"))
    with pytest.raises(RecipeError, match=r"mine\.yaml, line 4"):
        plan_recipe(path)


@pytest.mark.parametrize(("name", "content"), [("mine.yaml", b"\xff\xfe"), ("mine.md", b"x: 1"), ("absent.yaml", None)])
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str, content: bytes | None):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=name):
        plan_recipe(tmp_path / name)


def test_an_unknown_name_lists_the_shipped_recipes():
    with pytest.raises(RecipeError, match="Did you mean 'qwen3'"):
        find_recipe("qwen")
    assert find_recipe("qwen3") == SHIPPED["qwen3"]


# Against a model's sizes.


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


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ('{"10": [0], "10.0": [1]}', "'10' and '10.0' are the same depth, 10"),
        ("{10.5: [0], 10.50: [1]}", "line 4: '10.50' was given in line 4 already, as '10.5'"),
        ('{10.5: [0], "10.50": [1]}', "10.5 and '10.50' are the same depth, 10.5"),
        ("{ten: [0], 3: [1]}", ""),
    ],
)
def test_a_depth_written_in_two_ways_is_refused_with_the_recipe(kept: str, words: str):
    text = GOOD.replace("min_depth: 2", f"min_depth: 2, kept_layers: {kept}")
    if words:
        assert words in refusal(text)
    else:
        assert plan_recipe(text)  # what is no depth is refused against the model, where the message knows its layers


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


@pytest.mark.parametrize(
    ("round_to", "words"),
    [("256", "round_to 256"), ("{mpl: 2}", "mpl"), ("0", "round_to 0")],
)
def test_round_to_must_leave_something(round_to: str, words: str):
    recipe = plan_recipe(GOOD.replace('["1", "3/4"]', f'["1", "3/4"], round_to: {round_to}'))
    with pytest.raises(RecipeError, match=words):
        recipe.against(config_of())


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


# The shipped recipes.

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
