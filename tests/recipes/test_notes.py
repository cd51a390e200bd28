"""What a recipe's user is told before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.recipes.notes import notes
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import config_of, recipe

SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}


def told(depth: dict[str, Any], width: dict[str, Any], extraction: dict[str, Any] | None, **config: Any) -> list[str]:
    """Return the notes of a recipe on a model."""
    elastic = {"OneForAllDistillationModifier": {"elastic_dir": "elastic"}}
    last = [elastic] if extraction is None else [{"SubnetExtractionModifier": extraction}]
    text = recipe(
        {"DepthShrinkingModifier": {"min_depth": 2} | depth},
        {"WidthShrinkingModifier": {"widths": ["1", "3/4"]} | width}, *last,
    )  # fmt: skip
    plan = plan_recipe(text)
    return notes(plan, plan.against(config_of(**config)))


@pytest.mark.parametrize(
    ("depth", "width", "extraction", "words"),
    [
        ({}, {"allocation": "global"}, {"shape": "3x3/4"}, ["allocation: global gives", "portable: true in Subnet"]),
        ({}, {"allocation": "global"}, None, ["allocation: global gives", "amoeba extract --portable"]),
        ({}, {"anchor_layers": 1}, {"shape": "3x3/4"}, ["anchor_layers gives"]),
        ({"granularity": "sublayer"}, {}, {"shape": "2.5x1"}, ["granularity: sublayer gives"]),
        (
            {"granularity": "sublayer"}, {"allocation": "global"}, {"shape": "3x3/4"},
            ["allocation: global and granularity: sublayer give "],
        ),
        ({}, {"allocation": "global"}, {"shape": "3x1"}, None),
        ({}, {"allocation": "global"}, {"shape": "3x3/4", "portable": True}, None),
        ({}, {}, {"shape": "3x3/4"}, None),
    ],
)  # fmt: skip
def test_subnets_that_need_code_of_their_own_are_told_before(
    depth: dict[str, Any], width: dict[str, Any], extraction: dict[str, Any] | None, words: list[str] | None
) -> None:
    found = told(depth, width, extraction)
    assert len(found) == (words is not None)
    for each in words or ():
        assert each in found[0]
        assert "trust_remote_code=True" in found[0]


@pytest.mark.parametrize(
    ("round_to", "config", "words"),
    [
        (128, SMOLLM2, "round_to 128 leaves attention of this model one smaller size than its 3 units of 192 channels"),
        ({"attention": 384}, SMOLLM2, "round_to 384 leaves attention of this model one smaller size"),
        (64, SMOLLM2, None),
        (
            {"mlp": 128},
            SMOLLM2,
            "round_to 128 leaves mlp of this model no smaller size than its 128 units of 1 channels",
        ),
        (1, SMOLLM2 | {"num_attention_heads": 2, "num_key_value_heads": 2}, None),  # two heads: not for rounding
    ],
)
def test_rounding_that_leaves_nothing_to_choose_is_told_before(
    round_to: Any, config: dict[str, Any], words: str | None
) -> None:
    intermediate = {} if isinstance(round_to, dict) and "mlp" in round_to else {"intermediate_size": 1536}
    found = told({}, {"round_to": round_to, "allocation": "global"}, {"shape": "3x1"}, **config | intermediate)
    assert len(found) == (words is not None)
    if words is not None:
        assert words in found[0]
        advised = int(found[0].rpartition("round_to ")[2].split()[0])
        again = round_to | dict.fromkeys(round_to, advised) if isinstance(round_to, dict) else advised
        assert told({}, {"round_to": again, "allocation": "global"}, {"shape": "3x1"}, **config | intermediate) == []


def test_check_warns_and_still_says_that_it_can_run(tmp_path: Path) -> None:
    config_of(**SMOLLM2, intermediate_size=1536, num_hidden_layers=28).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["check", "qwen3", "--model", str(tmp_path / "model")])
    assert done.exit_code == 0
    assert "warning: round_to 128 leaves attention" in done.output
    assert "can run on" in done.output
