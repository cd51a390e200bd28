"""What a run needs of memory and disk: counted from the configuration, compared with what is there in the end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.fit.needs import bytes_in
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.recipes.disk import TEXTS, DiskNeed, NumberSizes, Phase, recipe_disk
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.memory import LIBRARIES, MemoryNeed, search_states
from amoeba_plugin.recipes.needs import Needs, recipe_needs
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.recipes.run import run_recipe
from amoeba_plugin.recipes.weights import Weights
from amoeba_plugin.shape import SubnetShape
from support.recipes import GOOD, config_of


def weights_of(recipe: str = GOOD) -> Weights:
    config = config_of()
    return Weights(plan_recipe(recipe), config, architecture_of(config))


def needs_of(recipe: str, samples: int = 8, length: int = 16) -> Needs:
    plan, config = plan_recipe(recipe), config_of()
    found = recipe_needs(plan, plan.against(config), samples, length)
    assert found is not None
    return found


def test_weights_are_those_of_a_model_that_is_made() -> None:
    weights, model = weights_of(), AutoModelForCausalLM.from_config(config_of())
    layers = [sum(each.numel() for each in layer.parameters()) for layer in model.model.layers]
    assert weights.whole == sum(each.numel() for each in model.parameters())
    assert weights.of_shapes([SubnetShape.parse("3x1")])[SubnetShape.parse("3x1")] == weights.whole - layers[0]


def test_phases_follow_one_another() -> None:
    """What stays adds up, what is there for a while does not."""
    need = DiskNeed([Phase({"a": 10}, meanwhile=5, temporary=100), Phase({"b": 20}, meanwhile=1, temporary=50)])
    assert (need.output, need.temporary, need.together) == (31, 100, 115)
    assert need.written == {"a": 10, "b": 20}


def test_memory_is_that_of_the_largest_stage() -> None:
    assert MemoryNeed(5, 10, {"one": 3, "other": 7}).peak == 22
    assert MemoryNeed(5, 10, {}).peak == 15


@pytest.mark.parametrize(
    "change",
    [
        ('"3/4"]}', '"3/4"], repair: none}'),
        ("{min_depth: 2}", "{min_depth: 2, repair: none}"),
        ("{min_depth: 2}", "{min_depth: 3}"),
    ],
)
def test_what_is_not_repaired_takes_no_room(change: tuple[str, str]) -> None:
    assert change[0] in GOOD
    assert weights_of(GOOD.replace(*change)).repaired < weights_of().repaired


def test_states_beyond_their_memory_are_in_files() -> None:
    weights = weights_of()
    few, sizes = search_states(weights, 8, 16, 4), NumberSizes(4, 4)
    assert all(size <= limit for size, limit in few.values())
    many = 3_000_000  # rows of 16 tokens of 4 bytes for every channel and layer
    beyond = sum(max(0, size - limit) for size, limit in search_states(weights, many, 16, 4).values())
    assert beyond > 0
    assert recipe_disk(weights, many, 16, sizes, weights.whole).phases[0].temporary == beyond
    assert recipe_disk(weights, 8, 16, sizes, weights.whole).phases[0].temporary == 0


def saved_model(directory: Path) -> Path:
    AutoModelForCausalLM.from_config(config_of()).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)
    return directory


def run_on_words(recipe: str, directory: Path) -> None:
    """Run a recipe on a small model and 12 rows of text, of which 8 are drawn."""
    (directory / "recipe.yaml").write_text(recipe)
    rows = [{"text": " ".join(f"w{(3 * row + 7 * place) % 97}" for place in range(24))} for row in range(12)]
    (directory / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_recipe(
        str(directory / "recipe.yaml"), str(saved_model(directory / "model")), str(directory / "text.jsonl"),
        directory / "out", RunOptions(num_samples=8, max_seq_length=16, batch_size=2, dtype="float32"),
    )  # fmt: skip


def test_a_run_takes_no_more_than_it_was_told(tmp_path: Path) -> None:
    elastic = tmp_path / "elastic"
    given = '{min_depth: 2, kept_layers: {"3": [0, 2, 3], "2": [0, 2]}}'  # one removed layer, and two that are apart
    recipe = GOOD.partition("quantize_stage")[0].replace("max_steps: 2", f"max_steps: 2, elastic_dir: {elastic}")
    recipe = recipe.replace("{min_depth: 2}", given).replace(
        '"3/4"]}', '"3/4"], allocation: uniform, resume_dir: STEPS}'
    )
    recipe = recipe.replace("STEPS", str(tmp_path / "steps"))
    run_on_words(recipe, tmp_path)
    told, weights = needs_of(recipe).disk.written, weights_of(recipe)
    assert SubnetStrategy.load(elastic).repairs.bytes == 4 * weights.repaired > 0
    adapter = sum(each.stat().st_size for each in (elastic / "adapter").iterdir())
    assert adapter <= told["the adapter"] <= adapter + TEXTS
    tensors = elastic / "strategy.safetensors"
    assert tensors.stat().st_size <= told["the strategy with repaired weights"]
    steps = bytes_in(tmp_path / "steps")
    assert tensors.stat().st_size <= steps <= told["the selection's steps"]


def test_check_tells_both(tmp_path: Path) -> None:
    config_of().save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(GOOD)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml"), "--model", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    memory = re.search(r"memory: about ([\d.]+) ([MG])B at most", told)
    assert memory is not None
    assert float(memory[1]) * {"M": 1e6, "G": 1e9}[memory[2]] > LIBRARIES
    assert re.search(r"disk: at most [\d.]+ MB stay", told)


TUNING = """
tune_stage:
  tune_modifiers:
    AdaptiveLayerTuningModifier:
      exits: {depths: ["1/2", "1"], vote: none}
      max_steps: 2
      batch_size: 4
      gradient_accumulation_steps: 1
"""


def tuning_memory(*fields: str) -> int:
    return needs_of(TUNING + "".join(f"      {each}\n" for each in fields), 8, 64).memory.stages["the layer tuning"]


def test_the_memory_of_a_tuning_follows_its_fields() -> None:
    plain, states = tuning_memory(), 4 * 8 * 64 * config_of().hidden_size  # of the upper half's window
    assert tuning_memory("gradient_checkpointing: true") < plain
    assert tuning_memory("window: 1") < plain
    assert tuning_memory("cache_gib: 1") == plain + states
    assert tuning_memory("cache_gib: 1.0e-6") == plain + round(1e-6 * 2**30)
    assert tuning_memory("cache_gib: 1", "checkpoint_dir: somewhere") == plain  # they are in files
    assert tuning_memory("adapter: none", "keep_states: false") < tuning_memory("adapter: none")
    need = needs_of(TUNING + "      memory: 800MB\n").memory
    assert need.peak == max(800_000_000, LIBRARIES + need.model)


@pytest.mark.parametrize("adapter", ["{type: lora, r: 4}", "{type: smol, r: 2, num_experts: 3}", "none"])
def test_a_tuning_takes_no_more_of_the_disk_than_it_was_told(adapter: str, tmp_path: Path) -> None:
    recipe = TUNING + f"      adapter: {adapter}\n      tuned_dir: {tmp_path / 'tuned'}\n"
    recipe += "      policy: sequential\n      cache_gib: 1\n"
    recipe += f"      save_steps: 1\n      checkpoint_dir: {tmp_path / 'steps'}\n"
    run_on_words(recipe, tmp_path)
    told = needs_of(recipe).disk.written
    tuned, steps = bytes_in(tmp_path / "tuned"), bytes_in(tmp_path / "steps")
    assert tuned <= told["the tuned model"] <= 2 * tuned + 2 * TEXTS
    assert steps <= told["the layer tuning's checkpoints"] + told["states below its windows"]
