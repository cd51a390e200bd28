"""Recipes: what is refused, with which words, before anything loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import GOOD, config_of, refusal


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
    "missing field": ("{min_depth: 2}", "{}", ["DepthShrinkingModifier has no min_depth; give the layers"]),
    "min_depth 0": ("{min_depth: 2}", "{min_depth: 0}", ["min_depth 0 is impossible", "from 1 on"]),
    "min_depth in words": ("{min_depth: 2}", "{min_depth: two}", ["min_depth 'two' is impossible"]),
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


@pytest.mark.parametrize(
    ("round_to", "words"),
    [("256", "round_to 256"), ("{mpl: 2}", "mpl"), ("0", "round_to 0")],
)
def test_round_to_must_leave_something(round_to: str, words: str):
    recipe = plan_recipe(GOOD.replace('["1", "3/4"]', f'["1", "3/4"], round_to: {round_to}'))
    with pytest.raises(RecipeError, match=words):
        recipe.against(config_of())
