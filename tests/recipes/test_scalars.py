"""What YAML reads otherwise than it looks is refused with what to write; what it reads as it looks is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import GOOD, refusal

SHAPE, DEPTH = "{shape: 3x3/4}", "{min_depth: 2}"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("0x3", "the number 3"), ("010", "the number 8"), ("0b11", "the number 3"), ("1:30", "the number 90"),
        ("1:30.5", "the number 90.5"), (".inf", "the number inf"), ("1.5e+400", "the number inf"),
        ("2024-01-01", "a date"), ("2024-13-45", "a date"), ("9" * 5000, "no number"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["value", "key", "element"])
def test_a_number_that_is_another_to_yaml_is_to_be_quoted(text: str, read: str, place: str):
    recipe = {
        "value": GOOD.replace(SHAPE, f"{{shape: {text}}}"),
        "key": GOOD.replace(DEPTH, f"{{min_depth: 2, kept_layers: {{? {text} : [0, 1, 2]}}}}"),
        "element": GOOD.replace('["1", "3/4"]', f'["1", {text}]'),
    }[place]
    message = refusal(recipe)
    assert f"line {next(n for n, line in enumerate(recipe.splitlines(), 1) if text in line)}: " in message
    assert f" is {read} to YAML; quote it" in message


@pytest.mark.parametrize("text", ["0x3", "010", "1:30", ".inf", "2024-01-01", "no"])
def test_quoted_it_is_text(text: str):
    assert plan_recipe(GOOD.replace(DEPTH, f"{{min_depth: 2, resume_dir: '{text}'}}")).depth.resume_dir == text


@pytest.mark.parametrize("text", ["3", "+3", "3.0", "3.", '"3"', "'3'", "3x1", "3x1.0", " 3 x 1 "])
def test_decimal_numbers_and_words_are_read_as_they_look(text: str):
    assert str(plan_recipe(GOOD.replace(SHAPE, f"{{shape: {text}}}")).shape) == "3x1"


def test_digits_may_be_grouped_as_yaml_does():
    assert plan_recipe(GOOD.replace("max_steps: 2", "max_steps: 1_000")).training.max_steps == 1000


@pytest.mark.parametrize("widths", ["[1, 3/4]", "[1.0, 0.75]", "[1, .75]", "['1', '3/4']"])
def test_widths_need_no_quotes(widths: str):
    assert plan_recipe(GOOD.replace('["1", "3/4"]', widths)).width.widths == ["1", "3/4"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (DEPTH, "{min_depth: 2, resume_dir: no}", "yes, no, on and off as true and false: quote a word"),
        (DEPTH, "{min_depth: 2, resume_dir: 123}", "a valid string; quote it"),
        (SHAPE, "{shape: on}", "yes, no, on and off as true and false: quote a word"),
        (DEPTH, "{min_depth: 2, on: 3}", "'True', as YAML reads it, is no field"),
        (DEPTH, "{min_depth: 2, 1: 3}", "'1', as YAML reads it, is no field"),
        (DEPTH, "{min_depth: !!int two}", "line 4 holds what is not plain data"),
        (DEPTH, "{min_depth: !!bool foo}", "line 4 holds what is not plain data"),
        (DEPTH, '{min_depth: 2, resume_dir: "a\\0b"}', "line 4: 'a\\x00b' holds the character U+0000"),
        (DEPTH, '{min_depth: 2, resume_dir: "\\ud800"}', "holds the character U+D800"),
    ],
)
def test_what_is_no_text_for_a_field_is_refused_with_its_line(old: str, new: str, words: str):
    assert words in refusal(GOOD.replace(old, new))


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace(SHAPE, "{shape: " + "[" * 3000 + "]" * 3000 + "}"),
        "{a_stage: " * 3000 + "}" * 3000,
        "\n".join(" " * depth + "a_stage:" for depth in range(1500)),
    ],
    ids=["brackets", "braces", "indents"],
)
def test_endless_nesting_is_no_recipe(text: str):
    assert "nests hundreds of brackets or indents" in refusal(text)


def test_anchors_that_multiply_are_refused_before_they_are_written_out():
    anchors = ["&a0 [1, 1]", *(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    lists = ", ".join(f'"{number}": {each}' for number, each in enumerate(anchors))
    assert "more than 100000 values" in refusal(GOOD.replace(DEPTH, f"{{min_depth: 2, kept_layers: {{{lists}}}}}"))


def test_fields_may_come_from_an_anchor():
    assert plan_recipe(GOOD.replace(DEPTH, "{<<: {min_depth: 2}}")).depth.min_depth == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.yaml", GOOD.encode("utf-16"), "save it as UTF-8"),
        ("r.yaml", f"# caf\N{LATIN SMALL LETTER E WITH ACUTE}\n{GOOD}".encode("latin-1"), "save it as UTF-8"),
        ("r.yaml", GOOD.encode() + b"\0", "is no YAML"),
        ("r.json", GOOD.encode(), "name it .yaml if it is YAML"),
        ("r.json", b"[" * 100_000, "is no JSON"),
    ],
    ids=["utf-16", "latin-1", "a NUL byte", "YAML named JSON", "brackets"],
)
def test_a_file_in_another_encoding_or_notation_says_what_to_do(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        plan_recipe(tmp_path / name)


def test_a_recipe_may_begin_with_a_byte_order_mark_and_may_be_json(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(GOOD.encode("utf-8-sig"))
    (tmp_path / "r.json").write_text(json.dumps(yaml.safe_load(GOOD)))
    for name in ("r.yaml", "r.json"):
        assert str(plan_recipe(tmp_path / name).shape) == "3x3/4"


def test_a_name_that_no_file_can_have_is_no_recipe():
    with pytest.raises(RecipeError, match="File name too long"):
        plan_recipe("r" * 5000)
