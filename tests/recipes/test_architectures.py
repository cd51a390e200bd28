"""Architectures in llm-compressor: select, extract and quantize in one recipe, then reload what was saved."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import llmcompressor
import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.recipe import Recipe
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

import amoeba_plugin  # noqa: F401  # registers the modifiers
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy
from amoeba_plugin.errors import ArchitectureError, RecipeError
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.run import run_recipe
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import importance_named, repair_named
from amoeba_plugin.selection.repair.collect import collect_moments
from amoeba_plugin.selection.repair.depth import fold_depths
from amoeba_plugin.selection.repair.moments import ChannelMoments
from amoeba_plugin.selection.repair.width import repair_shapes
from amoeba_plugin.selection.width.ranking import rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.testing.random_models import random_model
from support import support_matrix
from support.architectures import CONFIGS, EXPERTS, INSIDE_ONESHOT, OFFSET_NORMS, OWN_STAGE, QUANTIZED
from support.models import logits, save_base
from support.recipes import run

SIZES = {"opt": ("ffn_dim", 48), "qwen3_moe": ("moe_intermediate_size", 24)}
TOKENS = torch.arange(3, 15)[None]  # and in RELOAD
RECIPE: dict[str, Any] = {
    "select_stage": {
        "select_modifiers": {
            "DepthShrinkingModifier": {"min_depth": 2},
            "WidthShrinkingModifier": {"widths": ["1", "3/4"], "allocation": "uniform"},
        }
    },
    "extract_stage": {"extract_modifiers": {"SubnetExtractionModifier": {"shape": "3x3/4"}}},
    "quantize_stage": {
        "quantization_modifiers": {
            "QuantizationModifier": {"targets": ["Linear"], "scheme": "W8A8", "ignore": ["lm_head"]}
        }
    },
}


pytestmark = pytest.mark.usefixtures("fresh_session")


def require_subnet(directory: Path, model_type: str, quantized: bool = True) -> PreTrainedModel:
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == (model_type, 3)
    field, neurons = SIZES.get(model_type, ("intermediate_size", 48))
    assert config[field] == neurons
    narrow = model_type not in ("opt", "gpt_neox")
    assert config["num_attention_heads"] == (6 if narrow else 8)
    assert ("quantization_config" in config) == quantized
    reloaded: PreTrainedModel
    reloaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    return reloaded


@pytest.mark.parametrize("model_type", INSIDE_ONESHOT)
def test_a_recipe_saves_a_quantized_subnet_that_reloads_equal(model_type: str, data: Dataset, tmp_path: Path) -> None:
    base = save_base(random_model(CONFIGS[model_type]), tmp_path / "base")
    model = run(base, yaml.safe_dump(RECIPE, sort_keys=False), data, tmp_path / "out")
    reloaded = require_subnet(tmp_path / "out", model_type)
    torch.testing.assert_close(logits(reloaded, TOKENS), logits(model, TOKENS), atol=1e-5, rtol=0)


def test_fused_layers_of_different_sizes_are_quantized_too(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = {"widths": ["1", "3/4"], "allocation": "global"}
    selecting = {"DepthShrinkingModifier": {"min_depth": 2}, "WidthShrinkingModifier": width}
    monkeypatch.setitem(RECIPE["select_stage"], "select_modifiers", selecting)
    base = save_base(random_model(CONFIGS["phi3"]), tmp_path / "base")
    model = run(base, yaml.safe_dump(RECIPE, sort_keys=False), data, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len({layer.mlp.down_proj.in_features for layer in reloaded.model.layers}) > 1
    assert reloaded.config.quantization_config.quant_method == "compressed-tensors"
    torch.testing.assert_close(logits(reloaded, TOKENS), logits(model, TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", OWN_STAGE)
def test_what_oneshot_exchanges_modules_of_is_refused_there_with_the_way_round(
    model_type: str, data: Dataset, tmp_path: Path
) -> None:
    base = save_base(random_model(CONFIGS[model_type]), tmp_path / "base")
    with pytest.raises(ArchitectureError, match="Run the same recipe with `amoeba run`"):
        run(base, yaml.safe_dump(RECIPE, sort_keys=False), data, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def run_apart(base: Path, data: Dataset, output: Path, *stages: str, quantizing: dict[str, Any] | None = None) -> Path:
    """Run some stages of the recipe as ``amoeba run`` does, with other quantization modifiers if given."""
    data.save_to_disk(str(output.parent / "data"))
    recipe = output.parent / "recipe.yaml"
    chosen: dict[str, Any] = {stage: RECIPE[stage] for stage in stages}
    if quantizing is not None:
        chosen["quantize_stage"] = {"quantization_modifiers": quantizing}
    recipe.write_text(yaml.safe_dump(chosen, sort_keys=False))
    options = RunOptions(num_samples=8, max_seq_length=16, dtype="float32")
    reset_session()
    return run_recipe(str(recipe), str(base), str(output.parent / "data"), output, options).directory


@pytest.mark.parametrize("model_type", OWN_STAGE)
def test_a_stage_of_its_own_saves_an_ordinary_subnet(model_type: str, data: Dataset, tmp_path: Path) -> None:
    base = save_base(random_model(CONFIGS[model_type]), tmp_path / "base")
    if model_type in EXPERTS:
        with pytest.raises(ArchitectureError, match="not quantized activations.*W4A16 or W8A16"):
            run_apart(base, data, tmp_path / "out", *RECIPE)
    dense = run_apart(base, data, tmp_path / "out", "select_stage", "extract_stage")
    reloaded = require_subnet(dense, model_type, quantized=False)
    recipe = Recipe.create_instance(str(dense / "recipe.yaml"))
    kept = {int(depth): tuple(layers) for depth, layers in recipe.modifiers[0].kept_layers.items()}
    adapter, whole = architecture_for(model_type), AutoModelForCausalLM.from_pretrained(base)
    rows = [{name: torch.tensor(data[name]) for name in data.column_names}]
    runs = LayerRuns.of(whole, adapter, rows)
    with ChannelMoments.of(2**30) as moments:
        collect_moments(runs, moments, progress=False)
        shares = [Fraction(1), Fraction(3, 4)]
        widths = rank_widths(WidthTask(whole, adapter, importance_named("obs"), shares, moments.stats, moments=moments))
    folds = fold_depths(runs, DepthStrategy(kept), progress=False)
    repairs = repair_shapes(runs, widths, repair_named("least_squares"), folds, progress=False)
    strategy = SubnetStrategy(DepthStrategy(kept), widths, model_fingerprint(whole, adapter), repairs=repairs)
    elastic = ElasticModel(whole, strategy)
    with elastic.active("3x3/4") as model:
        torch.testing.assert_close(logits(reloaded, TOKENS), logits(model, TOKENS), atol=1e-4, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "data", "out", "recipe.yaml"]


@pytest.mark.parametrize("model_type", OFFSET_NORMS)
def test_a_stage_of_its_own_is_followed_by_quantization(model_type: str, data: Dataset, tmp_path: Path) -> None:
    base = save_base(random_model(CONFIGS[model_type]), tmp_path / "base")
    dense = run_apart(base, data, tmp_path / "dense", "select_stage", "extract_stage")
    quantized = run_apart(base, data, tmp_path / "out", *RECIPE)
    reloaded = require_subnet(quantized, model_type)
    for name in ("DepthShrinkingModifier", "SubnetExtractionModifier", "QuantizationModifier"):
        assert name in (quantized / "recipe.yaml").read_text()
        assert name in (quantized / "README.md").read_text()
    for words in ("`3x3/4`", "layers kept | 3 of 4", "weights of 8 bits", str(base)):
        assert words in (quantized / "README.md").read_text(), words
    assert "quantized" not in (dense / "README.md").read_text()
    for directory, after in ((dense, ""), (quantized, ", before quantization")):
        found = r"differ from the elastic model's by at most (\S+) over 64 tokens, predictions by (\S+) nats per token"
        row = rf"\| parity \| logits {found} \(mean KL\){after} \|"
        parity = re.search(row, (directory / "README.md").read_text())
        assert parity is not None
        assert float(parity[1]) < 1e-4
        assert 0 <= float(parity[2]) < 1e-6
    assert "SubnetExtractionModifier" in (dense / "README.md").read_text()
    expected = logits(AutoModelForCausalLM.from_pretrained(dense), TOKENS)
    # eight bits are near full precision: a norm that was converted once too often would not be
    assert (logits(reloaded, TOKENS) - expected).norm() < 0.05 * expected.norm()


RELOAD = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
with torch.no_grad():
    found = model(torch.arange(3, 15)[None], use_cache=False).logits.tolist()
Path(sys.argv[2]).write_text(json.dumps(found))
assert "amoeba_plugin" not in sys.modules
"""


@pytest.mark.parametrize(
    ("model_type", "quantizer"), [("mixtral", "GPTQModifier"), ("qwen3_moe", "QuantizationModifier")]
)
def test_quantized_experts_are_read_back_by_another_process(
    model_type: str, quantizer: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = []
    monkeypatch.setattr(llmcompressor, "oneshot", lambda **given: in_memory.append(oneshot(**given)))
    base = save_base(random_model(CONFIGS[model_type]), tmp_path / "base")
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8},
    }
    quantized = run_apart(
        base, data, tmp_path / "out", "select_stage", "extract_stage",
        quantizing={quantizer: {"ignore": ["lm_head"], "config_groups": {"group_0": scheme}}},
    )  # fmt: skip
    require_subnet(quantized, model_type)
    with safe_open(quantized / "model.safetensors", framework="pt") as file:
        assert sum(key.endswith("weight_packed") and "experts" in key for key in file.keys()) >= 3 * 3 * 3  # noqa: SIM118
    for name in ("DepthShrinkingModifier", "SubnetExtractionModifier", quantizer):
        assert name in (quantized / "recipe.yaml").read_text()
    subprocess.run([sys.executable, "-c", RELOAD, str(quantized), str(tmp_path / "logits.json")], check=True)
    found = torch.tensor(json.loads((tmp_path / "logits.json").read_text()))
    expected = logits(in_memory[0], TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (
        logits(AutoModelForCausalLM.from_pretrained(base), TOKENS) - expected
    ).abs().max() > 0.1  # it is not the base


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2"])
def test_layers_of_different_sizes_are_quantized_after_a_stage_of_their_own(
    model_type: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = []
    monkeypatch.setattr(llmcompressor, "oneshot", lambda **given: in_memory.append(oneshot(**given)))
    width = {"widths": ["1", "3/4"], "allocation": "global", "anchor_layers": [3]}  # the last layer is always kept
    if model_type == "gemma2":
        width["round_to"] = {"attention": 64}  # of 8, 6 and 4 heads, which divide the hidden size, 8
    selecting = {"DepthShrinkingModifier": {"min_depth": 2}, "WidthShrinkingModifier": width}
    monkeypatch.setitem(RECIPE["select_stage"], "select_modifiers", selecting)
    given = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}}
    base = save_base(random_model(CONFIGS[model_type]), tmp_path / "base")
    out = run_apart(
        base, data, tmp_path / "out", "select_stage", "extract_stage",
        quantizing={"QuantizationModifier": given},
    )  # fmt: skip
    assert (out / "modeling_per_layer.py").is_file()
    reloaded, report = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    sizes = [layer.mlp.experts.down_proj.shape[2] if model_type == "mixtral" else layer.mlp.down_proj.in_features
             for layer in reloaded.model.layers]  # fmt: skip
    assert len(set(sizes)) > 1
    torch.testing.assert_close(logits(reloaded, TOKENS), logits(in_memory[0], TOKENS), atol=1e-5, rtol=0)


WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"targets": ["Linear"], "scheme": "W8A8", "ignore": ["lm_head"]}, "quantized activations"),
        ({"targets": ["Linear"], "scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}, "quantized activations"),
        ({"targets": ["Linear"], "scheme": "NVFP4A16", "ignore": ["lm_head"]}, "weights in floating point"),
        ({"targets": ["Linear"], "scheme": "W4A16_ASYM", "ignore": ["lm_head"]}, "zero points"),
        ({"targets": ["Linear"], "scheme": "W8A16", "ignore": ["lm_head", "re:.*experts.*"]}, "not quantized"),
        ({"targets": ["Linear"], "scheme": "W8A16", "ignore": ["lm_head", "re:.*experts.*down_proj"]}, "not quantized"),
        (
            {"ignore": ["lm_head"], "config_groups": {
                "group_0": {"targets": ["re:.*self_attn.*"], "weights": WEIGHTS},
                "group_1": {"targets": ["re:.*experts.*"], "weights": WEIGHTS | {"num_bits": 4}},
            }},
            "several schemes",
        ),
    ],
)  # fmt: skip
def test_what_transformers_would_not_read_back_of_experts_is_refused_before_anything_runs(
    given: dict[str, Any], reason: str, data: Dataset, tmp_path: Path
) -> None:
    base = save_base(random_model(CONFIGS["qwen3_moe"]), tmp_path / "base")
    with pytest.raises(ArchitectureError, match=reason):
        run_apart(
            base, data, tmp_path / "out", "select_stage", "extract_stage", quantizing={"QuantizationModifier": given}
        )
    assert not (tmp_path / "out").exists()


def test_groups_must_divide_the_neurons_of_experts(data: Dataset, tmp_path: Path) -> None:
    base = save_base(random_model(CONFIGS["mixtral"]), tmp_path / "base")
    given = {"targets": ["Linear"], "scheme": "W4A16", "ignore": ["lm_head"]}
    with pytest.raises(RecipeError, match="groups of 128.*down_proj"):
        run_apart(base, data, tmp_path / "out", quantizing={"QuantizationModifier": given})


@pytest.mark.parametrize("experts_apart", [True, False])
def test_a_recipe_that_only_quantizes_experts_is_read_back_too(
    experts_apart: bool, data: Dataset, tmp_path: Path
) -> None:
    base = save_base(random_model(CONFIGS["mixtral"]), tmp_path / "base")
    if not experts_apart:  # then transformers renames nothing when it loads the base
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, save_original_format=False)
    given = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}}
    quantized = run_apart(base, data, tmp_path / "out", quantizing={"QuantizationModifier": given})
    card = (quantized / "README.md").read_text()
    assert card.count("QuantizationModifier") == 1
    assert str(base) in card
    reloaded, report = AutoModelForCausalLM.from_pretrained(quantized, output_loading_info=True)
    assert not report["missing_keys"]
    expected = logits(AutoModelForCausalLM.from_pretrained(base), TOKENS)
    # eight bits are near full precision, random experts are not
    assert (logits(reloaded, TOKENS) - expected).norm() < 0.05 * expected.norm()


def test_the_table_in_the_readme_is_what_the_tests_show() -> None:
    """Written by ``PYTHONPATH=tests python -m support.support_matrix``."""
    assert support_matrix.written() == support_matrix.table(CONFIGS, OWN_STAGE, QUANTIZED)
