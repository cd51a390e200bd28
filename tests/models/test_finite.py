"""One NaN anywhere in a model is found and named before anything is measured, and before anything is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.errors import ArtifactError, DataError, TrainingError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.models.finite import is_finite, not_finite, require_finite_weights
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.objectives import PerTokenLoss
from support.depth_search import searched
from support.models import offloaded, random_elastic
from support.recipes import EXTRACT, GIVEN_DEPTHS, WIDTH, recipe, run
from support.training import make_elastic, make_trainer

TinyModel = Callable[..., PreTrainedModel]


@torch.no_grad()
def put(model: PreTrainedModel, name: str, value: float) -> PreTrainedModel:
    model.get_parameter(name).flatten()[-1] = value
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_only_numbers_are_finite(dtype: torch.dtype) -> None:
    values = torch.randn(7, 5).to(dtype)
    assert is_finite(values)
    values[6, 4] = math.nan
    assert not is_finite(values)
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.arange(3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_the_parameter_is_named(tiny_model: TinyModel, name: str, value: float) -> None:
    require_finite_weights(tiny_model("llama"))
    with pytest.raises(ArtifactError, match=f"{name} of the model is NaN or infinite somewhere"):
        require_finite_weights(put(tiny_model("llama"), name, value))


def test_offloaded_weights_are_fetched(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    assert not_finite(offloaded(put(tiny_model("llama"), name, math.nan), "disk", tmp_path)) == name


@pytest.mark.usefixtures("fresh_session")
def test_a_recipe_that_measures_nothing_refuses_it_too(base: Path, data: Any, tmp_path: Path) -> None:
    model = put(AutoModelForCausalLM.from_pretrained(base), "model.layers.0.mlp.up_proj.weight", math.nan)
    model.save_pretrained(base)
    given = {"DepthShrinkingModifier": {"min_depth": 2, "kept_layers": GIVEN_DEPTHS}}
    magnitude = {"WidthShrinkingModifier": WIDTH["WidthShrinkingModifier"] | {"importance": "magnitude"}}
    with pytest.raises(ArtifactError, match="model.layers.0.mlp.up_proj.weight of the model is NaN"):
        run(base, recipe(given, magnitude, EXTRACT), data)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_search_on_a_model_of_one_s_own_names_it(
    tiny_model: TinyModel, random_batches: Callable[..., Any], value: float
) -> None:
    model = put(tiny_model("llama"), "model.layers.2.mlp.up_proj.weight", value)
    with pytest.raises(DataError, match=r"of the whole model is nan \(model.layers.2.mlp.up_proj.weight is NaN"):
        searched(model, architecture_for("llama"), PerTokenLoss(), random_batches(), min_depth=2, progress=False)


def test_a_training_on_a_model_of_one_s_own_names_it(tmp_path: Path) -> None:
    elastic = make_elastic()
    put(elastic.model, "model.layers.2.mlp.up_proj.weight", math.nan)
    with pytest.raises(TrainingError, match="Its weight model.layers.2.mlp.up_proj.weight is NaN"):
        make_trainer(elastic, tmp_path).train()


@pytest.mark.parametrize(
    ("name", "told"),
    [("model.layers.2.mlp.up_proj.weight", "layer 2, mlp.up_proj.weight"), ("model.norm.weight", "model.norm.weight")],
)
def test_a_subnet_is_not_cut_from_a_base_that_has_become_nan(
    tiny_model: TinyModel, tmp_path: Path, name: str, told: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("llama").save_pretrained(base)
    elastic = random_elastic(AutoModelForCausalLM.from_pretrained(base))
    save_elastic(elastic, None, tmp_path / "elastic", str(base))
    put(tiny_model("llama"), name, math.nan).save_pretrained(base)
    with pytest.raises(ArtifactError, match=f"^{told} is NaN or infinite somewhere"):
        extract_checkpoint(tmp_path / "elastic", elastic.space.largest, out)
    assert not out.exists()
