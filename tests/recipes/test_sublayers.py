"""granularity: sublayer from a recipe to a quantized checkpoint, from an elastic one, and what is refused before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.recipe import Recipe
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.deployment.loads import uniform_sizes
from amoeba_plugin.deployment.rules import candidate, require_loadable
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.subnet_config import config_for
from amoeba_plugin.errors import ArchitectureError, RecipeError, ShapeError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.shape import SubnetShape
from support.models import logits
from support.recipes import QUANTIZATION, TRAIN, WIDTH, recipe, run
from support.sublayers import TABLE

TinyModel = Callable[..., PreTrainedModel]
DEPTH = {"DepthShrinkingModifier": {"min_depth": 2, "granularity": "sublayer"}}


pytestmark = pytest.mark.usefixtures("fresh_session")


@pytest.mark.parametrize(("quantization", "portable"), [("gptq", False), ("w8a8", True)])
def test_a_whole_recipe_saves_a_quantized_subnet_that_reloads_equal(
    base: Path, data: Dataset, tmp_path: Path, quantization: str, portable: bool
) -> None:
    extraction = {"SubnetExtractionModifier": {"shape": "2.5x1/2", "portable": portable}}
    text = recipe(DEPTH | WIDTH, TRAIN, extraction, QUANTIZATION[quantization])
    model = run(base, text, data, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not portable)
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert ("stand_ins" in config) == (tmp_path / "out/modeling_per_layer.py").is_file() == (not portable)
    kept = Recipe.create_instance(str(tmp_path / "out/recipe.yaml")).modifiers[0].kept_layers
    assert list(kept) == ["4", "3.5", "3", "2.5", "2"]
    assert sum(0.5 if isinstance(each, str) else 1 for each in kept["2.5"]) == 2.5
    weights = {name.partition(".weight")[0] for name in reloaded.state_dict() if "layers." in name}
    linears = sum(name.endswith(("o_proj", "down_proj")) for name in weights)
    assert linears == (2 * config["num_hidden_layers"] if portable else 5)


def test_every_shape_of_an_elastic_checkpoint_comes_out_with_its_adapter(
    base: Path, data: Dataset, tmp_path: Path
) -> None:
    given = {"DepthShrinkingModifier": {"min_depth": 1, "kept_layers": TABLE}}
    train = {
        "OneForAllDistillationModifier": {
            **TRAIN["OneForAllDistillationModifier"],
            "elastic_dir": str(tmp_path / "elastic"),
        }
    }
    run(base, recipe(given | WIDTH, train), data)
    elastic, peft_model = load_elastic(tmp_path / "elastic")
    assert peft_model is not None
    assert str(elastic.space) == "depths {4, 3.5, 3, 2.5, 2, 1} x widths {1, 3/4, 1/2}"
    assert {depth: elastic.strategy.depth.listed(float(depth)) for depth in TABLE} == TABLE
    with elastic.active("3.5x1"):
        assert peft_model.base_model.router.weights("default").state.feature[:4].tolist() == [0.5, 1, 1, 1]
    for shape, options in (
        ("3x3/4", {}), ("2x1", {"adapter": "separate"}), ("2.5x1/2", {"portable": True}),
    ):  # fmt: skip
        out = tmp_path / f"out_{shape.replace('/', '_')}"
        parity = extract_checkpoint(tmp_path / "elastic", shape, out, **options)
        assert parity.max_logit_difference < 1e-4
        assert parity.adapter == options.get("adapter", "fold")
        with elastic.active(shape) as model:
            expected = logits(model)
        reloaded: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code="portable" not in options)
        if "adapter" in options:
            reloaded = PeftModel.from_pretrained(reloaded, str(out / "adapter"))
        torch.testing.assert_close(logits(reloaded.eval()), expected, atol=1e-4, rtol=0)
        card = (out / "README.md").read_text()
        assert f"`{shape}`" in card
        assert f": {', '.join(map(str, TABLE[shape.partition('x')[0]]))}" in card
        assert ("no speed is gained" in card) == ("portable" in options)
    assert "0.attention" in (tmp_path / "out_2x1/README.md").read_text()


def checked(tmp_path: Path, *groups: dict[str, Any]) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(*groups))
    return plan_recipe(path)


def extraction(shape: str, **fields: Any) -> dict[str, Any]:
    return {"SubnetExtractionModifier": {"shape": shape, **fields}}


@pytest.mark.parametrize(
    ("depth", "shape", "message"),
    [
        ({"min_depth": 2}, "2.5x1", "keeps half a layer.*set granularity: sublayer"),
        ({"min_depth": 3, "granularity": "sublayer"}, "2.5x1", "its depth is below min_depth 3"),
    ],
)
def test_a_shape_that_the_recipe_does_not_give_is_refused(
    tmp_path: Path, depth: dict[str, Any], shape: str, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        checked(tmp_path, {"DepthShrinkingModifier": depth}, extraction(shape))


def test_options_of_the_search_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="granularity means nothing to selector magnitude"):
        checked(
            tmp_path, {"DepthShrinkingModifier": {"min_depth": 2, "granularity": "sublayer", "selector": "magnitude"}}
        )
    with pytest.raises(RecipeError, match="granularity"):
        checked(tmp_path, {"DepthShrinkingModifier": {"min_depth": 2, "granularity": "head"}})


@pytest.mark.parametrize("engine", ["torch", "vllm", "llama-cpp", "openvino"])
def test_engines_are_asked_whether_they_load_layers_in_part(tiny_model: TinyModel, tmp_path: Path, engine: str) -> None:
    config, adapter = tiny_model("llama").config, architecture_for("llama")
    by_recipe = checked(tmp_path, DEPTH | WIDTH, extraction("3x1/2")).against(config).subnet
    by_shape = config_for(adapter, config, uniform_sizes(adapter, config, SubnetShape.parse("2.5x1/2")))
    for subnet in (by_shape, by_recipe):
        found = candidate(subnet, adapter, engine)
        assert found.linears["down_proj of layer 0"] == found.linears["o_proj of layer 0"] == (64, 64)
        assert "o_proj of layer 1" not in found.linears
        if engine == "torch":
            assert "trust_remote_code" in " ".join(each.rule.says for each in require_loadable(found, engine))
        else:
            with pytest.raises(ArchitectureError, match="layers without attention or MLP: .*--portable"):
                require_loadable(found, engine)
    stock = checked(tmp_path, DEPTH | WIDTH, extraction("3x1/2", portable=True)).against(config).subnet
    whole = checked(tmp_path, DEPTH | WIDTH, extraction("4x1/2")).against(config).subnet
    for subnet in (stock, whole):
        require_loadable(candidate(subnet, adapter, engine), engine)


def test_group_sizes_are_checked_where_layers_are_kept_in_part(tiny_model: TinyModel, tmp_path: Path) -> None:
    config = tiny_model("llama").config
    for portable in (False, True):
        steps = (DEPTH | WIDTH, extraction("2.5x3/4", portable=portable))
        checked(tmp_path, *steps, QUANTIZATION["gptq"]).against(config)  # 96 and 96 inputs
        config.intermediate_size = 120
        with pytest.raises(RecipeError, match=r"do not divide down_proj \(90 inputs\)"):
            checked(tmp_path, *steps, QUANTIZATION["gptq"]).against(config)
        config.intermediate_size = 128


def test_what_no_class_holds_is_refused_before_the_search(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3", num_hidden_layers=4, head_dim=16, num_attention_heads=8,
                                  num_key_value_heads=4, hidden_size=64, intermediate_size=128)  # fmt: skip
    width = {"WidthShrinkingModifier": {"widths": ["1", "1/2"], "bias_compensation": True}}
    with pytest.raises(ArchitectureError, match="bias_compensation: false"):
        checked(tmp_path, DEPTH | width, extraction("2.5x1/2")).against(config)
