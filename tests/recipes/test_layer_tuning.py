"""Layer tuning in recipes: alone, in front of a quantization and behind it, and what is refused before weights load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.errors import AmoebaError, RecipeError
from amoeba_plugin.modifiers import AdaptiveLayerTuningModifier, ExitOptions
from amoeba_plugin.recipes.estimate import stage_costs
from amoeba_plugin.recipes.files import find_recipe
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.recipes.run import run_recipe
from amoeba_plugin.training.layer_tuning.probing import Planned
from amoeba_plugin.training.layer_tuning.voting_model import VotingModel
from support.batches import token_dataset
from support.models import logits, make_tiny_model, require_close, save_base
from support.recipes import WIDTH, config_of, recipe
from support.recipes import run as oneshot_run

TESTS = Path(__file__).parent.parent
OPTIONS = RunOptions(num_samples=8, max_seq_length=16, dtype="float32")
TOKENS = torch.arange(3, 15)[None]
GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT4 = {"QuantizationModifier": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": GROUP}},
        "ignore": ["lm_head"]}}  # fmt: skip


def tuning(tuned: Path | None, **fields: Any) -> dict[str, Any]:
    """Return the modifier with a short training."""
    exits = {"depths": [2, "3/4", "1"], "held_out": 3} | fields.pop("exits", {})
    few = {"max_steps": 3, "gradient_accumulation_steps": 1, "learning_rate": 0.01, "seed": 1}
    where = {} if tuned is None else {"tuned_dir": str(tuned)}
    adapter = {"adapter": {"type": "lora", "r": 2}}
    return {"AdaptiveLayerTuningModifier": {"exits": exits, **adapter, **few, **where, **fields}}


def run_text(text: str, base: Path, data: Path, output: Path) -> None:
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(text)
    run_recipe(str(path), str(base), str(data), output, OPTIONS)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(make_tiny_model("llama"), tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    token_dataset().save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("adapter", ["none", "lora", "smol"])
def test_a_tuned_model_is_whole_and_its_exits_vote_beside_it(adapter: str, base: Path, data: Path, tmp_path: Path):
    fields = {"adapter": adapter if adapter == "none" else {"type": adapter, "r": 2}}
    text = recipe(tuning(tmp_path / "tuned", **fields))
    run_text(text, base, data, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(model.config, "exit_depths")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "exit" in name]
    voting = VotingModel.from_pretrained(tmp_path / "tuned")
    assert voting.votes.depths == (2, 3, 4)
    with voting.exits.active(4):
        require_close(logits(voting.model), logits(model))  # the whole model is the exit behind all layers
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)
    assert voting.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False).shape[1] > TOKENS.shape[1]
    (group,) = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["tune_stage"].values()
    assert "AdaptiveLayerTuningModifier" in group


def test_a_subnet_is_tuned_and_then_quantized(base: Path, data: Path, tmp_path: Path):
    extract = {"SubnetExtractionModifier": {"shape": "4x1/2"}}
    text = recipe(WIDTH, extract, tuning(tmp_path / "tuned", adapter="none"), INT4)
    run_text(text, base, data, tmp_path / "out")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert quantized.config.quantization_config is not None
    voting = VotingModel.from_pretrained(tmp_path / "tuned")
    assert voting.exits.model.config.intermediate_size == quantized.config.intermediate_size == 64
    spread = logits(voting.exits.model).std()
    assert (logits(quantized) - logits(voting.exits.model)).abs().mean() < spread  # 4 bits of what was tuned


@pytest.mark.parametrize("adapter", ["lora", "smol"])
def test_a_quantized_checkpoint_is_tuned_by_an_adapter(adapter: str, base: Path, data: Path, tmp_path: Path):
    text = recipe(INT4, tuning(tmp_path / "tuned", adapter={"type": adapter, "r": 2}, learning_rate=0.05))
    run_text(text, base, data, tmp_path / "out")
    alone = tmp_path / "alone"
    run_text(recipe(INT4), base, data, alone)
    found, expected = (load_file(each / "model.safetensors") for each in (tmp_path / "out", alone))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())  # the quantized model stays
    voting = VotingModel.from_pretrained(tmp_path / "tuned")
    assert voting.votes.depths == (2, 3, 4)
    with voting.model.disable_adapter():
        require_close(logits(voting.model), logits(AutoModelForCausalLM.from_pretrained(alone)), 1e-4)
        without = logits(voting.model)
    assert not torch.allclose(logits(voting.model), without, atol=1e-2)
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert [name for stage in kept.values() for group in stage.values() for name in group] == [
        "QuantizationModifier", "AdaptiveLayerTuningModifier",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "support.reload_tuned", tmp_path / "tuned", tmp_path / "found.safetensors"],
        check=True, cwd=TESTS,
    )  # fmt: skip
    for depth, value in load_file(tmp_path / "found.safetensors").items():
        with voting.exits.active(int(depth)), torch.no_grad():
            require_close(value, voting.model(TOKENS, use_cache=False).logits)


def test_the_shipped_recipe_chooses_bits_quantizes_tunes_and_votes(data: Path, tmp_path: Path):
    base = save_base(make_tiny_model("llama", hidden_size=128, num_attention_heads=8), tmp_path / "base")
    text = yaml.safe_load(find_recipe("edge_llm").read_text())
    (fields,) = text["tune_stage"]["amoeba_tune_modifiers"].values()
    fields |= {"max_steps": 6, "tuned_dir": str(tmp_path / "tuned"), "exits": fields["exits"] | {"held_out": 2}}
    run_text(yaml.safe_dump(text, sort_keys=False), base, data, tmp_path / "out")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    groups = quantized.config.quantization_config.quantization_config.config_groups
    assert len({group.weights.num_bits for group in groups.values()}) > 1
    voting = VotingModel.from_pretrained(tmp_path / "tuned")
    assert voting.votes.depths == (2, 4)
    assert voting.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False).shape[1] > TOKENS.shape[1]


def test_a_recipe_is_planned_and_runs_as_planned(base: Path, data: Path, tmp_path: Path):
    text = recipe(tuning(tmp_path / "tuned", memory="64GiB", deadline="1h"))
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    result = CliRunner().invoke(
        app, ["plan", str(path), "--model", str(base), "--dataset", str(data), "--num-calibration-samples", "8",
              "--max-seq-length", "16"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "sequences a step, windows as asked for" in " ".join(result.output.split())
    run_text(text, base, data, tmp_path / "out")
    planned = Planned.load(tmp_path / "tuned" / "plan.json")
    assert planned.took["memory"] < 64 * 2**30
    refused = CliRunner().invoke(
        app, ["plan", str(path), "--model", str(base), "--dataset", str(data), "--memory", "1MB"]
    )
    assert refused.exit_code == 2
    assert "no plan trains within" in " ".join(refused.output.split())
    refused = CliRunner().invoke(app, ["plan", "demo", "--model", str(base), "--dataset", str(data)])
    assert refused.exit_code == 2
    assert "has no AdaptiveLayerTuningModifier" in " ".join(refused.output.split())


def test_oneshot_refuses_to_tune_behind_a_quantization(base: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="is a stage of its own.*run the same recipe with `amoeba run`"):
        oneshot_run(base, recipe(INT4, tuning(tmp_path / "tuned")))


def test_the_same_run_again_computes_nothing(base: Path, data: Path, tmp_path: Path):
    text = recipe(tuning(tmp_path / "tuned"))
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    first = run_recipe(str(path), str(base), str(data), tmp_path / "out", OPTIONS)
    assert any("VotingModel.from_pretrained" in told for told in first.in_words)
    assert not run_recipe(str(path), str(base), str(data), tmp_path / "out", OPTIONS).is_new


def test_a_training_goes_on_from_its_checkpoints(base: Path, data: Path, tmp_path: Path):
    def run(name: str, **fields: Any) -> dict[str, torch.Tensor]:
        text = recipe(tuning(None, policy="sequential", cache_gib=0.01, save_steps=1, max_steps=4, **fields))
        run_text(text, base, data, tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")

    whole = run("whole", checkpoint_dir=str(tmp_path / "kept"))
    (tmp_path / "kept" / "checkpoint-4").rename(tmp_path / "gone")
    again = run("again", checkpoint_dir=str(tmp_path / "kept"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert (tmp_path / "kept" / "checkpoint-4").is_dir()
    with pytest.raises(AmoebaError, match="holds checkpoints of another training: its cache_gib is 0.01"):
        text = recipe(tuning(None, checkpoint_dir=str(tmp_path / "kept"), max_steps=4))
        run_text(text, base, data, tmp_path / "other")


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([tuning(None), tuning(None)], "comes 2 times"),
        ([tuning(None), WIDTH], "stands before WidthShrinkingModifier, which changes the structure"),
        ([WIDTH, tuning(None)], "with no SubnetExtractionModifier between them"),
        ([INT4, tuning(None)], "tuned_dir is missing"),
        ([INT4, tuning(Path("tuned"), adapter="none")], "quantized weights cannot be trained"),
        ([tuning(None, policy="best")], "choose one of random, cyclic, sequential"),
        ([tuning(None, weights=[1, 2])], "weights 1, 2 of 3 exits"),
        ([tuning(None, cache_gib=1, stacked=True)], "take policy sequential, or exits that are not stacked"),
        ([tuning(None, memory="1")], "'1' is no quantity here"),
        ([tuning(None, deadline="1GiB")], "one of s, min, h"),
        ([tuning(None, exits={"depths": [0]})], "exits.depths has 0"),
        ([tuning(None, exits={"depths": ["3/2"]})], "exits.depths has '3/2'"),
        ([tuning(None, exits={"vote": "all"})], "choose one of weighted, maximum, none"),
        ([tuning(None, warmup_steps=3)], "does nothing with lr_scheduler_type: constant"),
        ([tuning(None, save_steps=3)], "save_steps does nothing without checkpoint_dir"),
    ],
)
def test_impossible_recipes_are_refused_before_a_model_is_read(groups: list[dict[str, Any]], told: str):
    with pytest.raises(AmoebaError) as refused:
        plan_recipe(recipe(*groups))
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("exits", "told"), [([2, 5], "2, 5 of 4 layers"), ([1, 2], "the deepest is the whole model: 4"),
                        (["1/2", 2, "1"], "give different ones"), (["1/9", "1"], "are 0, 4 of 4 layers")]
)  # fmt: skip
def test_exits_that_a_model_has_not_are_refused_before_weights_load(exits: list[Any], told: str):
    plan = plan_recipe(recipe(tuning(None, exits={"depths": exits})))
    with pytest.raises(RecipeError, match=r"AdaptiveLayerTuningModifier: exits.depths") as refused:
        plan.against(config_of())
    assert told in str(refused.value)


def test_what_a_training_costs_is_told():
    text = recipe(tuning(None, exits={"depths": [2, "1"]}, weights=[1, 3], max_steps=10, gradient_accumulation_steps=2))
    (cost,) = stage_costs(plan_recipe(text), config_of(), 8, 16)
    # a quarter of the steps runs 2 of 4 layers forward and backward, three run 2 forward and 2 both ways
    assert cost.passes == pytest.approx(20 * (0.25 * 6 + 0.75 * 8) / 4)
    assert cost.stage == "layer tuning"


def test_too_few_sequences_are_refused(base: Path, data: Path, tmp_path: Path):
    text = recipe(tuning(None, exits={"held_out": 8}))
    with pytest.raises(AmoebaError, match=r"8 sequences, of which exits.held_out keeps 8"):
        run_text(text, base, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_directory_is_not_overwritten(base: Path, data: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(AmoebaError, match="is no tuned model; nothing is overwritten"):
        run_text(recipe(tuning(tmp_path / "full")), base, data, tmp_path / "out")
    assert (tmp_path / "full" / "mine").read_text() == "kept"


def test_defaults_are_those_of_the_paper_or_its_code():
    fields = AdaptiveLayerTuningModifier()
    assert (fields.learning_rate, fields.gradient_accumulation_steps, fields.max_grad_norm) == (4e-4, 16, 0.3)
    assert ExitOptions().of(32) == (8, 16, 24, 32)
