"""A base whose defaults of generation transformers would not save: subnets have them all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from support.models import random_elastic
from support.recipes import recipe, run

TinyModel = Callable[..., PreTrainedModel]
GIVEN = {"temperature": 0.9, "top_p": 0.6, "max_length": 77}  # no do_sample, as in Vicuna's


@pytest.fixture
def base(base: Path, tmp_path: Path) -> Path:
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | GIVEN))
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        GenerationConfig.from_pretrained(base).save_pretrained(tmp_path / "refused")
    return base


def require_given(directory: Path) -> None:
    found = json.loads((directory / "generation_config.json").read_text())
    assert {name: found[name] for name in GIVEN} == GIVEN
    assert not found.get("do_sample")
    assert AutoModelForCausalLM.from_pretrained(directory).generation_config.top_p == 0.6


def test_an_elastic_checkpoint_and_its_subnets_keep_them(base: Path, tmp_path: Path) -> None:
    elastic = random_elastic(AutoModelForCausalLM.from_pretrained(base), bias_compensation=False)
    save_elastic(elastic, None, tmp_path / "elastic", str(base), trained_base=True)
    require_given(tmp_path / "elastic/base")
    extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "out")
    require_given(tmp_path / "out")


@pytest.mark.usefixtures("fresh_session")
def test_the_subnet_of_a_recipe_keeps_them(base: Path, tmp_path: Path, data: Dataset) -> None:
    kept = {"DepthShrinkingModifier": {"min_depth": 3, "kept_layers": {"3": [0, 1, 3]}}}
    run(base, recipe(kept, {"SubnetExtractionModifier": {"shape": "3"}}), data, tmp_path / "out")
    require_given(tmp_path / "out")
