"""A policy's recipe by llm-compressor alone, the modifier that fills those behind it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.errors import AmoebaError
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.recipes.run import run_recipe
from amoeba_plugin.selection.layerwise.compress import rounded
from amoeba_plugin.selection.layerwise.options import Grid
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy
from support.architectures import CONFIGS
from support.batches import token_dataset
from support.models import logits, make_tiny_model, save_base
from support.recipes import WIDTH, config_of, recipe
from support.recipes import run as oneshot_run

# What a user without this package runs. Printed: how far the reloaded model is from the one in memory.
ALONE = """
import sys
sys.modules["amoeba_plugin"] = None
import torch
from datasets import load_from_disk
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM
model, recipe, data, out = sys.argv[1:]
made = oneshot(model=model, recipe=recipe, dataset=load_from_disk(data), output_dir=out, num_calibration_samples=8,
               max_seq_length=16, precision="float32")
tokens = torch.arange(3, 60)[None]
again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
with torch.no_grad():
    print("apart", float((again(tokens).logits - made.eval()(tokens).logits).abs().max()))
"""
POLICY = {"LayerwisePolicyModifier": {"average_bits": 6, "exchanges": 1}}
GPTQ = {"GPTQModifier": {"ignore": ["lm_head"]}}
RTN = {"QuantizationModifier": {"ignore": ["lm_head"]}}
WANDA = {"WandaPruningModifier": {"sparsity": 0.3}}
SPARSEGPT = {"SparseGPTModifier": {"sparsity": 0.3}}
OPTIONS = RunOptions(num_samples=8, max_seq_length=16, dtype="float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    token_dataset().save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A base in bf16, in which scales take 16 bits."""
    return save_base(make_tiny_model("llama").bfloat16(), tmp_path / "base")


def policy(base: Path, data: Path, *options: str) -> tuple[int, str]:
    """Run ``amoeba policy``; return its exit code and what it said."""
    words = ["policy", str(base), "--dataset", str(data), "--num-calibration-samples", "4", "--max-seq-length", "16"]
    done = CliRunner().invoke(app, [*words, "--quiet", *options])
    return done.exit_code, " ".join(done.output.split())


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: each for path in directory.glob("*.safetensors") for name, each in load_file(path).items()}


def stored_bits(directory: Path) -> float:
    """Bits on disk of a weight of the decoder layers' linears, from the file."""
    bits = weights = 0
    for name, each in tensors(directory).items():
        if "_proj." in name and not name.endswith(("weight_shape", "bias")):
            bits += each.nbytes * 8
            if name.endswith(("weight_packed", "weight")):
                weights += each.numel() if name.endswith(".weight") else 0
            if name.endswith("weight_packed"):
                shape = tensors(directory)[name.replace("packed", "shape")]
                weights += int(shape.prod())
    return bits / weights


def run(base: Path, data: Path, output: Path, *groups: dict[str, Any]) -> Path:
    path = output.parent / f"{output.name}.yaml"
    path.write_text(recipe(*groups))
    return run_recipe(str(path), str(base), str(data), output, OPTIONS).directory


# --- the command


@pytest.mark.parametrize(
    "options",
    [
        ("--quantizer", "rtn", "--average-bits", "6"),
        ("--average-bits", "5", "--average-sparsity", "0.3", "--bits", "3,4,8", "--sparsities", "0,0.3,0.6"),
        ("--quantizer", "rtn", "--pruner", "wanda", "--average-bits", "6", "--average-sparsity", "0.2", "--asymmetric"),
        ("--average-sparsity", "0.4", "--sensitivity", "output_error", "--allocation", "mean"),
    ],
    ids=["rtn", "sparsegpt and gptq", "wanda and rtn with zero points", "sparsity by the mean"],
)
def test_the_recipe_runs_without_this_package_and_reloads_with_equal_logits(
    tmp_path: Path, half: Path, data: Path, options: tuple[str, ...]
):
    made = policy(half, data, "-o", str(tmp_path / "policy.yaml"), "--data", str(tmp_path / "policy.json"), *options)
    assert made[0] == 0, made[1]
    command = [sys.executable, "-c", ALONE, half, tmp_path / "policy.yaml", data, tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("apart")[1]) < 1e-4
    found = LayerwisePolicy.load(tmp_path / "policy.json")
    saved = tensors(tmp_path / "out")
    for unit in found.units.values():
        for path in unit.modules:
            assert (f"{path}.weight_packed" in saved) == (unit.bits != 16), path


def test_averages_are_those_of_the_file(tmp_path: Path, half: Path, data: Path):
    """Scales, zero points and all; and a unit's modules have one scheme."""
    options = ("--average-bits", "6", "--quantizer", "rtn", "--asymmetric", "--exchanges", "0")
    options += ("--plot", str(tmp_path / "p.svg"))
    assert policy(half, data, "-o", str(tmp_path / "p.yaml"), "--data", str(tmp_path / "p.json"), *options)[0] == 0
    out = run_recipe(str(tmp_path / "p.yaml"), str(half), str(data), tmp_path / "out", OPTIONS).directory
    found = LayerwisePolicy.load(tmp_path / "p.json")
    assert len({unit.bits for unit in found.units.values()}) > 1
    assert stored_bits(out) == pytest.approx(found.average_bits, rel=1e-3)
    assert 5 < found.average_bits <= 6
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_zeros_are_where_the_policy_says(tmp_path: Path, half: Path, data: Path):
    options = ("--average-sparsity", "0.3", "--pruner", "wanda", "--exchanges", "0")
    assert policy(half, data, "-o", str(tmp_path / "p.yaml"), "--data", str(tmp_path / "p.json"), *options)[0] == 0
    out = run_recipe(str(tmp_path / "p.yaml"), str(half), str(data), tmp_path / "out", OPTIONS).directory
    found, saved = LayerwisePolicy.load(tmp_path / "p.json"), tensors(out)
    assert len({unit.sparsity for unit in found.units.values()}) > 1
    zeros = total = 0
    for unit in found.units.values():
        for path in unit.modules:
            weight = saved[f"{path}.weight"]
            assert float((weight == 0).float().mean()) == pytest.approx(
                int(unit.columns * unit.sparsity) / unit.columns
            )
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    assert zeros / total == pytest.approx(found.average_sparsity)
    assert zeros / total >= 0.3


def test_rounding_to_nearest_is_what_was_measured(tmp_path: Path, half: Path, data: Path):
    options = ("--average-bits", "7", "--quantizer", "rtn", "--exchanges", "0")
    assert policy(half, data, "-o", str(tmp_path / "p.yaml"), "--data", str(tmp_path / "p.json"), *options)[0] == 0
    out = run_recipe(str(tmp_path / "p.yaml"), str(half), str(data), tmp_path / "out", OPTIONS).directory
    found = LayerwisePolicy.load(tmp_path / "p.json")
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).eval()
    with torch.no_grad():
        for unit in found.units.values():
            for path in unit.modules:
                weight = model.get_submodule(path).weight
                weight.copy_(rounded(weight, unit.bits, Grid(found.group_size, found.symmetric)))
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=0.1, rtol=0.05)  # its scales are stored in bf16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--average-bits", "4"), "the nearest is 4.25"),
        (("--average-bits", "17"), "from 4.25 to below 16"),
        (("--average-sparsity", "0.9"), "the nearest is 0.7"),
        (("--average-bits", "5", "--bits", "5,6"), "no host holds weights so"),
        (("--average-bits", "5", "--bits", "four"), "are no numbers"),
        (("--average-sparsity", "0.3", "--sparsities", "0,0.9"), "give shares from 0 to 0.7"),
        (("--average-bits", "5", "--group-size", "48"), "group_size 64"),
        (("--average-bits", "5", "--sensitivity", "kld"), "no sensitivity named 'kld'. Did you mean 'kl'"),
        (("--average-bits", "5", "--allocation", "mean", "--bits", "3,4"), "6 is none of the bits"),
        ((), "wants average_bits, average_sparsity, or both"),
    ],
)
def test_what_is_impossible_is_refused_before_weights_load(
    tmp_path: Path, data: Path, options: tuple[str, ...], words: str
):
    """There are none: only a configuration."""
    config_of().save_pretrained(tmp_path / "config_only")
    code, said = policy(tmp_path / "config_only", data, "-o", str(tmp_path / "policy.yaml"), *options)
    assert (code, words in said) == (2, True), said
    assert not (tmp_path / "policy.yaml").exists()


def test_nothing_is_overwritten(tmp_path: Path, half: Path, data: Path):
    (tmp_path / "policy.yaml").write_text("mine")
    code, said = policy(half, data, "-o", str(tmp_path / "policy.yaml"), "--average-bits", "6")
    assert code == 2
    assert "exists; nothing is overwritten" in said
    assert (tmp_path / "policy.yaml").read_text() == "mine"


def test_low_bits_and_zeros_say_what_they_are_worth(tmp_path: Path, half: Path, data: Path):
    options = ("--average-bits", "5", "--bits", "3,8", "--average-sparsity", "0.3", "--exchanges", "0")
    code, said = policy(half, data, "-o", str(tmp_path / "policy.yaml"), *options)
    assert code == 0
    assert "weights of 3 bits are read by transformers only" in said
    assert "make nothing faster or smaller" in said


# --- the modifier


@pytest.mark.parametrize(
    "behind", [[GPTQ], [RTN], [{"QuantizationModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}]],
    ids=["gptq", "rtn", "w8a8"],
)  # fmt: skip
def test_the_modifier_fills_the_quantizer_behind_it(
    tmp_path: Path, half: Path, data: Path, behind: list[dict[str, Any]]
):
    out = run(half, data, tmp_path / "out", POLICY, *behind)
    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    (filled,) = (
        fields
        for groups in saved.values()
        for modifiers in groups.values()
        for name, fields in modifiers.items()
        if name == "LayerwisePolicyModifier"
    )
    bits = {name: pair[0] for name, pair in filled["choices"].items()}
    assert len(set(bits.values())) > 1
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    by_module = {module: group["weights"]["num_bits"] for group in groups for module in group["targets"]}
    for unit, each in bits.items():
        layer, names = unit.split(".")
        for name in names.split("+"):
            found = {
                by_module.get(path, 16) for path in by_module if f"layers.{layer}." in path and path.endswith(name)
            }
            assert found == ({each} if each != 16 else set()), unit
    activations = {group["input_activations"] is not None for group in groups}
    assert activations == {"W8A8" in str(behind)}
    assert "W8A8" in str(behind) or stored_bits(out) <= 6  # with rounded activations, 4 bits are stored in 8
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert bool(torch.isfinite(logits(reloaded)).all())


def test_the_saved_recipe_repeats_the_run_without_measuring(tmp_path: Path, half: Path, data: Path):
    first = run(half, data, tmp_path / "first", POLICY, GPTQ)
    text = (first / "recipe.yaml").read_text()
    (tmp_path / "again.yaml").write_text(text)
    plan = plan_recipe(tmp_path / "again.yaml")
    assert plan.policy.is_decided
    again = run_recipe(str(tmp_path / "again.yaml"), str(half), str(data), tmp_path / "again", OPTIONS).directory
    one, other = tensors(first), tensors(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("pruner", [WANDA, SPARSEGPT], ids=["wanda", "sparsegpt"])
def test_the_modifier_fills_pruner_and_quantizer_behind_an_extraction(
    tmp_path: Path, half: Path, data: Path, pruner: dict[str, Any]
):
    """A subnet of mixed bits and zeros, of three layers; a module's zeros are its own."""
    policy = {"LayerwisePolicyModifier": {"average_bits": 6, "average_sparsity": 0.3, "exchanges": 1}}
    depth = {"DepthShrinkingModifier": {"min_depth": 3, "selector": "greedy", "repair": "none"}}
    width = {"WidthShrinkingModifier": WIDTH["WidthShrinkingModifier"] | {"repair": "none"}}
    extract = {"SubnetExtractionModifier": {"shape": "3x1/2"}}
    out = run(half, data, tmp_path / "out", depth, width, extract, policy, pruner, RTN)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (3, 64)
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert bool(torch.isfinite(logits(reloaded)).all())
    saved = yaml.safe_load((out / "recipe.yaml").read_text())["policy_stage"]
    choices = next(iter(saved.values()))["LayerwisePolicyModifier"]["choices"]
    assert len(choices) == 3 * 4
    zeros = total = 0.0
    for unit, (_, sparsity) in choices.items():
        layer, names = unit.split(".")
        for path, module in reloaded.named_modules():
            if f"layers.{layer}." in path and path.rpartition(".")[2] in names.split("+"):
                share = float((module.weight == 0).float().mean())
                assert share >= int(module.in_features * sparsity) / module.in_features - 0.02
                zeros, total = zeros + share * module.weight.numel(), total + module.weight.numel()
    assert zeros / total >= 0.28


@pytest.mark.parametrize("pruner", [[], [WANDA]], ids=["bits alone", "with zeros"])
def test_inside_oneshot_the_reloaded_model_computes_the_same(tmp_path: Path, half: Path, pruner: list[dict[str, Any]]):
    fields = {"average_bits": 6, "exchanges": 0} | ({"average_sparsity": 0.2} if pruner else {})
    text = recipe({"LayerwisePolicyModifier": fields}, *pruner, GPTQ)
    made = oneshot_run(half, text, token_dataset(), tmp_path / "out", precision="float32").eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]) > 1
    with torch.no_grad():
        torch.testing.assert_close(logits(again), logits(made), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "allocation"), [("gemma2", "uniform"), ("llama", "global")],
    ids=["extracted in a stage of its own", "layers of different sizes"],
)  # fmt: skip
def test_a_policy_is_for_the_subnet_however_it_is_extracted(
    tmp_path: Path, data: Path, model_type: str, allocation: str
):
    config = {name: value for name, value in CONFIGS[model_type].items() if name != "model_type"}
    sizes = config if model_type == "gemma2" else {}
    base = save_base(make_tiny_model(model_type, **sizes).bfloat16(), tmp_path / "base")
    depth = {"DepthShrinkingModifier": {"min_depth": 3, "selector": "last_layers", "repair": "none"}}
    width = {
        "WidthShrinkingModifier": {
            "widths": ["1", "1/2"], "allocation": allocation, "round_to": 32, "repair": "none",
        }
    }  # fmt: skip
    out = run(base, data, tmp_path / "out", depth, width, {"SubnetExtractionModifier": {"shape": "3x1/2"}}, POLICY, RTN)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert ("per_layer_config" in config) == (allocation == "global")
    assert len(config["quantization_config"]["config_groups"]) > 1
    assert stored_bits(out) <= 6
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
    assert bool(torch.isfinite(logits(reloaded)).all())


def test_what_a_host_ignores_is_not_decided_on(tmp_path: Path, half: Path, data: Path):
    ignoring = {"QuantizationModifier": {"ignore": ["lm_head", "re:.*layers\\.0\\..*"]}}
    out = run(half, data, tmp_path / "out", POLICY, ignoring)
    assert not [name for name in tensors(out) if "layers.0." in name and "packed" in name]
    saved = yaml.safe_load((out / "recipe.yaml").read_text())["policy_stage"]
    choices = next(iter(saved.values()))["LayerwisePolicyModifier"]["choices"]
    assert {name.partition(".")[0] for name in choices} == {"1", "2", "3"}


def test_a_policy_of_a_file_is_taken_for_the_model_it_was_made_of_and_no_other(tmp_path: Path, half: Path, data: Path):
    file = str(tmp_path / "p.json")
    assert policy(half, data, "-o", str(tmp_path / "p.yaml"), "--data", file, "--average-bits", "6")[0] == 0
    given = {"LayerwisePolicyModifier": {"average_bits": 6, "policy": file}}
    run(half, data, tmp_path / "out", given, RTN)
    other = save_base(make_tiny_model("llama", layers=3), tmp_path / "other")
    with pytest.raises(AmoebaError, match="is of another model: it has 16 units of linears and the model 12"):
        plan_recipe(recipe(given, RTN)).against(config_of(num_hidden_layers=3))
    with pytest.raises(AmoebaError, match="is of another model"):
        run(other, data, tmp_path / "out2", given, RTN)
    sibling = save_base(make_tiny_model("llama", seed=5).bfloat16(), tmp_path / "sibling")
    with pytest.raises(AmoebaError, match="the same sizes and other weights"):
        run(sibling, data, tmp_path / "out3", given, RTN)
    assert not (tmp_path / "out3").exists()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([POLICY], "wants one modifier behind LayerwisePolicyModifier that it can fill"),
        ([RTN, POLICY], "stands before LayerwisePolicyModifier, which chooses for those behind it"),
        ([POLICY, GPTQ, RTN], "there are 2"),
        ([POLICY, WANDA], "there are 0"),
        ([{"LayerwisePolicyModifier": {"average_sparsity": 0.3}}, RTN], "average_sparsity wants one modifier"),
        (
            [{"LayerwisePolicyModifier": {"average_bits": 6, "average_sparsity": 0.3}}, RTN, WANDA],
            "would prune what is rounded already",
        ),
        (
            [
                {"LayerwisePolicyModifier": {"average_sparsity": 0.3}},
                {"WandaPruningModifier": {"sparsity": 0.5, "mask_structure": "2:4"}},
            ],
            "without a pattern",
        ),
        ([{"LayerwisePolicyModifier": {}}, RTN], "wants average_bits, average_sparsity, or both"),
        ([{"LayerwisePolicyModifier": {"average_bits": 6, "bits": [5]}}, RTN], "no host holds weights so"),
        (
            [{"LayerwisePolicyModifier": {"average_bits": 6, "choices": {"0.o_proj": [4]}}}, RTN],
            "give bits and sparsity",
        ),
        ([WIDTH, POLICY, RTN], "with no SubnetExtractionModifier between them"),
    ],
)
def test_recipes_in_which_a_policy_cannot_work_are_refused_by_their_text(groups: list[dict[str, Any]], words: str):
    with pytest.raises(AmoebaError) as caught:
        plan_recipe(recipe(*groups))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"LayerwisePolicyModifier": {"average_bits": 4}}, RTN], "the nearest is 4.25"),
        ([{"LayerwisePolicyModifier": {"average_bits": 6, "choices": {"0.o_proj": [4, 0.0]}}}, RTN], "another model"),
        ([POLICY, {"QuantizationModifier": {"scheme": "W4A16"}}], "groups of 128 do not divide"),
        ([POLICY, {"QuantizationModifier": {"scheme": "FP8"}}], "does not round weights to integers"),
        ([POLICY, {"QuantizationModifier": {"ignore": ["re:.*"]}}], "no linear to decide on"),
    ],
)
def test_recipes_that_do_not_fit_the_model_are_refused_without_its_weights(groups: list[dict[str, Any]], words: str):
    with pytest.raises(AmoebaError) as caught:
        plan_recipe(recipe(*groups)).against(config_of())
    assert words in str(caught.value)


def test_amoeba_check_refuses_averages_out_of_reach_with_code_2(tmp_path: Path):
    config_of().save_pretrained(tmp_path / "config_only")
    (tmp_path / "r.yaml").write_text(recipe({"LayerwisePolicyModifier": {"average_bits": 4}}, RTN))
    done = CliRunner().invoke(app, ["check", str(tmp_path / "r.yaml"), "--model", str(tmp_path / "config_only")])
    assert done.exit_code == 2
    assert "line 3: LayerwisePolicyModifier: average bits 4 are out of reach" in " ".join(done.output.split())


def test_a_mixture_of_experts_is_refused_with_the_reason():
    config = config_of("mixtral", num_local_experts=3, num_experts_per_tok=2)
    with pytest.raises(AmoebaError, match="reads back one scheme for all layers alone"):
        plan_recipe(recipe(POLICY, RTN)).against(config)
