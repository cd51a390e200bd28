"""The modifiers in llm-compressor's own `oneshot`: one recipe, then reload what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import disk_offload
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from llmcompressor.core import State, active_session, reset_session
from llmcompressor.modifiers import ModifierFactory
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import amoeba_plugin  # noqa: F401  # registers the modifiers
from amoeba_plugin.data.multiple_choice import load_questions
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.linear import ElasticLinear
from amoeba_plugin.errors import ArchitectureError, ArtifactError, DataError, PluginError, RecipeError
from amoeba_plugin.modifiers import (
    DepthShrinkingModifier,
    OneForAllDistillationModifier,
    SubnetExtractionModifier,
    WidthShrinkingModifier,
    register_with_llmcompressor,
)
from amoeba_plugin.modifiers.order import require_order
from amoeba_plugin.modifiers.selection import on_main_device
from amoeba_plugin.selection.depth import search
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy
from support.models import logits
from support.recipes import DEPTH, EXTRACT, GIVEN_DEPTHS, QUANTIZATION, TRAIN, WIDTH, recipe, run

TinyModel = Callable[..., PreTrainedModel]


pytestmark = pytest.mark.usefixtures("fresh_session")


@pytest.mark.parametrize("quantization", list(QUANTIZATION))
def test_a_whole_recipe_saves_a_checkpoint_that_reloads_equal(
    base: Path, data: Dataset, tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quantization == "awq":  # the host pins memory without asking whether there is an accelerator
        monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *args, **kwargs: None)
    text = recipe(DEPTH | WIDTH, TRAIN, EXTRACT, QUANTIZATION[quantization])
    model = run(base, text, data, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "out/config.json").read_text())
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    assert [config[name] for name in sizes] == [3, 4, 2, 64, 16]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = Recipe.create_instance(str(tmp_path / "out/recipe.yaml"))
    assert len(again.modifiers) == 3 + 1 + len(QUANTIZATION[quantization])
    assert again.modifiers[0].kept_layers["3"] == list(sorted(again.modifiers[0].kept_layers["3"]))
    assert len(again.modifiers[0].kept_layers["3"]) == 3


@pytest.mark.parametrize("quantization", ["gptq", "w8a8"])
@pytest.mark.parametrize("portable", [False, True])
def test_layers_of_different_sizes_are_quantized_in_the_same_recipe(
    base: Path, data: Dataset, tmp_path: Path, quantization: str, portable: bool
) -> None:
    width = {"widths": ["1", "1/2"], "allocation": "global", "round_to": {"mlp": 32}}
    extraction = {"shape": "3x1/2", "portable": portable}
    text = recipe(
        DEPTH | {"WidthShrinkingModifier": width}, {"SubnetExtractionModifier": extraction}, QUANTIZATION[quantization]
    )
    model = run(base, text, data, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert ("auto_map" in config) == ("per_layer_config" in config) == (not portable)
    assert (tmp_path / "out/modeling_per_layer.py").is_file() == (not portable)
    sizes = {(layer.self_attn.o_proj.in_features, layer.mlp.down_proj.in_features) for layer in model.model.layers}
    assert (len(sizes) == 1) == portable
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not portable)
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    for position, layer in enumerate(reloaded.model.layers):
        own = reloaded.config.per_layer_config[position] if not portable else reloaded.config
        assert layer.mlp.gate_proj.out_features == own.intermediate_size
        assert layer.self_attn.k_proj.out_features == own.num_key_value_heads * 16


def test_attention_and_mlp_of_different_shares_fit_a_stock_class(base: Path, data: Dataset, tmp_path: Path) -> None:
    text = recipe(
        DEPTH | {"WidthShrinkingModifier": {"widths": ["1", "5/8"]}},
        {"SubnetExtractionModifier": {"shape": "3x5/8"}},
        QUANTIZATION["w8a8"],
    )
    model = run(base, text, data, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] in ("llama", "mistral")
    shares = config["num_key_value_heads"] / 4, config["intermediate_size"] / 128
    assert shares[0] != shares[1]
    assert {(layer.self_attn.k_proj.out_features, layer.mlp.up_proj.out_features) for layer in model.model.layers} == {
        (config["num_key_value_heads"] * 16, config["intermediate_size"])
    }


def test_the_model_card_says_what_was_done(base: Path, data: Dataset, tmp_path: Path) -> None:
    text = recipe(DEPTH | WIDTH, TRAIN, {"SubnetExtractionModifier": {"shape": "2x3/4"}}, QUANTIZATION["w8a8"])
    run(base, text, data, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    for words in ("`2x3/4`", "MistralForCausalLM", "folded in", "layers kept | 2 of 4", "weights of 8 bits", str(base)):
        assert words in card, words
    given = (tmp_path / "out/recipe.yaml").read_text().strip()
    assert f"```yaml\n{given}\n```" in card
    assert "trust_remote_code" not in card
    assert ModelCard(card).data.tags == ["amoeba_plugin"]
    assert not list((tmp_path / "out").glob("*.partial"))


def test_without_quantization_the_subnet_is_a_plain_checkpoint_of_its_own_class(
    base: Path, data: Dataset, tmp_path: Path
) -> None:
    model = run(base, recipe(DEPTH | WIDTH, {"SubnetExtractionModifier": {"shape": "2x3/4"}}), data, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], config["num_attention_heads"]) == (["MistralForCausalLM"], 6)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))


def test_the_elastic_checkpoint_of_a_recipe_holds_the_shape_it_extracted(
    base: Path, data: Dataset, tmp_path: Path
) -> None:
    train = {
        "OneForAllDistillationModifier": TRAIN["OneForAllDistillationModifier"]
        | {"elastic_dir": str(tmp_path / "elastic")}
    }
    model = run(base, recipe(DEPTH | WIDTH, train, EXTRACT), data)
    elastic, peft_model = load_elastic(tmp_path / "elastic")
    assert peft_model is not None
    with elastic.active("3x1/2"):
        torch.testing.assert_close(logits(elastic.model), logits(model), atol=1e-5, rtol=0)


def test_training_without_extraction_gives_the_whole_model_back(base: Path, data: Dataset, tmp_path: Path) -> None:
    train = {
        "OneForAllDistillationModifier": TRAIN["OneForAllDistillationModifier"]
        | {"elastic_dir": str(tmp_path / "elastic")}
    }
    before = logits(AutoModelForCausalLM.from_pretrained(base))
    model = run(base, recipe(DEPTH | WIDTH, train), data)
    assert not [module for module in model.modules() if isinstance(module, ElasticLinear)]
    assert not [name for name, _ in model.named_parameters() if "smol" in name]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_subnet(base: Path, data: Dataset) -> None:
    text = recipe(DEPTH | WIDTH, TRAIN, EXTRACT)
    first = run(base, text, data, shuffle_calibration_samples=False)
    reset_session()
    assert torch.equal(logits(first), logits(run(base, text, data, shuffle_calibration_samples=False)))


def test_the_adapter_was_trained_and_folded_in(base: Path, data: Dataset) -> None:
    untrained = run(base, recipe(DEPTH | WIDTH, EXTRACT), data)
    reset_session()
    assert not torch.allclose(
        logits(untrained), logits(run(base, recipe(DEPTH | WIDTH, TRAIN, EXTRACT), data)), atol=1e-3
    )


def test_a_saved_recipe_repeats_its_depths_without_searching(
    base: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "Search", None)
    given = {"DepthShrinkingModifier": {"min_depth": 2, "kept_layers": GIVEN_DEPTHS}}
    assert run(base, recipe(given, {"SubnetExtractionModifier": {"shape": "2x1"}}), data).config.num_hidden_layers == 2


def test_taylor_and_anchors_in_a_recipe_that_names_the_layers_it_found(
    base: Path, data: Dataset, tmp_path: Path
) -> None:
    width = {"widths": ["1", "1/2"], "importance": "taylor", "anchor_layers": 1, "allocation": "uniform"}
    train = {"OneForAllDistillationModifier": {"max_steps": 0, "elastic_dir": str(tmp_path / "elastic")}}
    run(base, recipe({"WidthShrinkingModifier": width}, train), data, tmp_path / "out")
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    (anchor,) = next(
        group["WidthShrinkingModifier"]["anchor_layers"]
        for stage in saved.values()
        for group in stage.values()
        if "WidthShrinkingModifier" in group
    )
    elastic, _ = load_elastic(tmp_path / "elastic")
    (_, units), strategy = elastic.strategy.width.units.items(), elastic.strategy.width
    assert strategy.importance == "taylor"
    neurons = [units[1][f"{layer}.mlp"] for layer in range(4)]
    assert neurons == [128 if layer == anchor else 43 for layer in range(4)]  # (4/2 - 1)/3 of 128


def test_questions_of_one_split_select_and_those_of_another_are_reported(
    base: Path, data: Dataset, tmp_path: Path
) -> None:
    rows = [
        {"question": f"w{i} w{i + 3}", "choices": [f"w{i + 1}", f"w{i + 2} w5"], "answer": i % 2} for i in range(20, 44)
    ]
    splits = {"validation": Dataset.from_list(rows[:12]), "test": Dataset.from_list(rows[12:])}
    DatasetDict(splits).save_to_disk(tmp_path / "questions")
    questions = {"dataset": str(tmp_path / "questions"), "report_split": "test", "letters": False}
    depth = {"min_depth": 3, "objective": "accuracy", "questions": questions | {"num_questions": 12}}
    train = {"OneForAllDistillationModifier": {"max_steps": 0, "elastic_dir": str(tmp_path / "elastic")}}
    run(base, recipe({"DepthShrinkingModifier": depth}, train), data)
    elastic, _ = load_elastic(tmp_path / "elastic")
    noted = elastic.strategy.provenance["accuracy"]
    assert noted["split"] == "test"
    batches = load_questions(
        str(tmp_path / "questions"), AutoTokenizer.from_pretrained(base), vocab_size=97, split="test", num_questions=12,
        seed=42, letters=False,
    )  # fmt: skip
    for depth_kept, accuracy in noted["by depth"].items():
        with elastic.active(f"{depth_kept}x1") as model:
            assert MultipleChoiceAccuracy().measure(model, batches).value == accuracy


def test_registering_twice_changes_nothing() -> None:
    register_with_llmcompressor()
    made = ModifierFactory.create(
        "SubnetExtractionModifier", allow_registered=True, allow_experimental=False, shape="2x1"
    )
    assert isinstance(made, SubnetExtractionModifier)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DepthShrinkingModifier(min_depth=2, keep_lst=1), "keep_lst"),
        (lambda: DepthShrinkingModifier(min_depth=0), "min_depth 0 is impossible; give a number of layers from 1 on"),
        (lambda: DepthShrinkingModifier(), "has no min_depth"),
        (lambda: DepthShrinkingModifier(min_depth=3, depths=[2]), "go below min_depth 3"),
        (lambda: DepthShrinkingModifier(depths=[0, 2]), "depths .* are impossible"),
        (
            lambda: DepthShrinkingModifier(min_depth=2, selector="block_influence", beam=2),
            "beam means nothing to selector block_influence: it is the dynamic program's",
        ),
        (lambda: WidthShrinkingModifier(widths=["1", "9/8"]), r"\(0, 1\]"),
        (lambda: WidthShrinkingModifier(widths=["3/4"]), "lack 1"),
        (lambda: WidthShrinkingModifier(widths="1"), "no list of shares"),
        (lambda: OneForAllDistillationModifier(adapter={"num_experts": 2, "top_k": 3}), "top_k 3 of num_experts 2"),
        (lambda: SubnetExtractionModifier(shape="3by4"), "no subnet shape|not a subnet shape"),
    ],
)
def test_a_bad_field_is_refused_when_the_recipe_is_parsed(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_totals_are_measured_over_all_layers() -> None:
    assert WidthShrinkingModifier(widths=["1"], anchor_layers=[2]).allocation == "measured"
    for other in ({"anchor_layers": 1}, {"allocation": "uniform"}):
        with pytest.raises(ValueError, match="or take allocation: measured without anchor_layers"):
            WidthShrinkingModifier(totals=["1/2"], **other)


def test_an_unknown_objective_or_importance_names_the_known_ones() -> None:
    with pytest.raises(PluginError, match="no objective named 'los'. Did you mean 'loss'"):
        DepthShrinkingModifier(min_depth=2, objective="los")
    with pytest.raises(PluginError, match="no depth selector named 'block_influenc'. Did you mean 'block_influence'"):
        DepthShrinkingModifier(min_depth=2, selector="block_influenc")
    with pytest.raises(PluginError, match="no importance named 'flapp'. Did you mean 'flap'"):
        WidthShrinkingModifier(widths=["1"], importance="flapp")


def modifiers_of(text: str) -> list[Any]:
    return list(Recipe.create_instance(text).modifiers)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((TRAIN, DEPTH, EXTRACT), "cannot work; the order is"),
        ((DEPTH, EXTRACT, TRAIN), "cannot work; the order is"),
        ((QUANTIZATION["w8a8"], DEPTH, EXTRACT), "QuantizationModifier stands before SubnetExtractionModifier"),
        ((DEPTH, TRAIN, QUANTIZATION["w8a8"]), "with no SubnetExtractionModifier between"),
        ((DEPTH, DEPTH, EXTRACT), "comes 2 times"),
        ((DEPTH, TRAIN), "keeps nothing of its selection"),
    ],
)
def test_an_order_that_cannot_work_is_refused(groups: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        require_order(modifiers_of(recipe(*groups)))


def test_the_order_is_checked_inside_a_session_before_anything_runs(base: Path, data: Dataset) -> None:
    with pytest.raises(RecipeError, match="the order is"):
        run(base, recipe(TRAIN, DEPTH, EXTRACT), data)


def test_no_calibration_data_is_refused(base: Path) -> None:
    with pytest.raises(DataError, match="calibration"):
        run(base, recipe(DEPTH, EXTRACT), None)


def test_a_depth_the_model_has_not_is_refused(base: Path, data: Dataset) -> None:
    with pytest.raises(RecipeError, match="min_depth"):
        run(base, recipe({"DepthShrinkingModifier": {"min_depth": 4}}, EXTRACT), data)


def test_an_elastic_dir_that_holds_something_else_is_refused_before_training(
    base: Path, data: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "elastic").mkdir()
    (tmp_path / "elastic/thesis.txt").write_text("years of work")
    train = {"OneForAllDistillationModifier": {"max_steps": 10**9, "elastic_dir": str(tmp_path / "elastic")}}
    with pytest.raises(ArtifactError, match="nothing is overwritten"):
        run(base, recipe(DEPTH, train), data)


def test_a_quantized_model_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    state = State(model=model)
    with pytest.raises(ArchitectureError, match="already quantized"):
        DepthShrinkingModifier(min_depth=2).initialize(state)
    assert active_session() is not None


def test_a_dispatched_model_stays_where_its_parts_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 9)[None]
    wanted = model(ids).logits
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    before = {name: tensor.device for name, tensor in model.state_dict(keep_vars=True).items()}
    with on_main_device(model) as device:
        assert device == torch.device("cpu")
        assert torch.equal(model(ids).logits, wanted)
    assert {name: tensor.device for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert torch.equal(model(ids).logits, wanted)
