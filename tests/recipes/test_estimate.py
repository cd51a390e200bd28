"""What a recipe will cost: counted as the stages count themselves, and told by `check`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.recipes.estimate import estimated, stage_costs
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.layerwise.compress import Compressor
from amoeba_plugin.selection.layerwise.options import Grid
from amoeba_plugin.selection.layerwise.search import PolicyBudget
from amoeba_plugin.selection.layerwise.task import DenseStates, SensitivityTask
from amoeba_plugin.selection.layerwise.units import layer_units
from amoeba_plugin.selection.registry import sensitivity_named
from support.batches import make_random_batches
from support.models import make_tiny_model
from support.recipes import GOOD, config_of, recipe


def test_stages_are_counted_as_they_are_run() -> None:
    """Of 4 layers down to 2, the last kept: twice 3 + 2 subnets and the whole one, on 3 of the sequences; 2 steps of
    4 x 2 rows, 4 subnets each."""
    depth, width, folds, repair, training = stage_costs(plan_recipe(GOOD), config_of(), samples=7, length=16)
    assert depth.what == "11 subnets on 3 sequences of 16 tokens"
    assert width.what == "a pass over 7 sequences of 16 tokens, at most 16 splits on 3 sequences of 16"
    assert folds.what == "2 depths, at most 2 passes each over 7 sequences of 16 tokens"
    assert repair.what == "4 passes over 7 sequences of 16 tokens"
    assert training.what == "2 steps, 16 sequences of 16 tokens through 4 subnets each"
    assert training.passes == 3 * 4 * 16


@pytest.mark.parametrize("name", ["kl", "output_error"])
def test_scoring_units_is_counted_as_it_is_run(name: str) -> None:
    """In layer-forwards: of 4 layers, beside the dense model's own pass; one choice is measured at the end."""
    fields = {"average_bits": 6, "exchanges": 0, "sensitivity": name}
    plan = plan_recipe(recipe({"LayerwisePolicyModifier": fields}, {"QuantizationModifier": {"ignore": ["lm_head"]}}))
    (cost,) = stage_costs(plan, config_of(), samples=2, length=12)
    model = make_tiny_model("llama")
    adapter, batches = architecture_of(model.config), make_random_batches(2, rows=1)
    units = layer_units(model, adapter)
    with DenseStates.of(LayerRuns.of(model, adapter, batches)) as dense:
        before = dense.lockstep.step_forwards
        lone = PolicyBudget(average_bits=6).lone
        sensitivity_named(name).measure(
            SensitivityTask(dense, batches, units, lone, Compressor(model, Grid(32)), False)
        )
        layers = dense.lockstep.step_forwards - before
    assert cost.passes == layers / 4 + 2
    assert "passes over 2 sequences of 12 tokens" in cost.what


ALL = ["depth search", "width ranking", "depth repair", "repair", "one-for-all training"]


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (("{min_depth: 2}", "{min_depth: 2, selector: last_layers}"), ALL[1:]),
        (("max_steps: 2", "max_steps: 0"), ALL[:4]),
        (("{min_depth: 2}", "{min_depth: 2, repair: none}"), [ALL[0], ALL[1], *ALL[3:]]),
        (('"3/4"]}', '"3/4"], repair: none}'), [*ALL[:3], ALL[4]]),
        (("{min_depth: 2}", "{min_depth: 2, max_batches: 1}"), ALL),
        (('"3/4"]}', '"3/4"], allocation: uniform, importance: magnitude}'), ALL),
    ],
)
def test_what_a_recipe_leaves_out_costs_nothing(change: tuple[str, str], stages: list[str]) -> None:
    plain = stage_costs(plan_recipe(GOOD), config_of(), 70, 16)
    changed = stage_costs(plan_recipe(GOOD.replace(*change)), config_of(), 70, 16)
    assert [cost.stage for cost in changed] == stages
    assert sum(cost.passes for cost in changed) < sum(cost.passes for cost in plain)


def test_time_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x parameters x tokens x passes at 40 % of the speed; the input's embedding is not multiplied by."""
    monkeypatch.setattr("amoeba_plugin.recipes.estimate.flops_per_second", lambda: 1e6)
    plan, config = plan_recipe(GOOD), config_of(tie_word_embeddings=False)
    line = estimated(stage_costs(plan, config, 8000, 16)[:1], config)[0]
    told = re.search(r"about (\d+) (s|min|h) here", line)
    assert told is not None
    hidden, layers, mlp, vocabulary = config.hidden_size, 4, config.intermediate_size, config.vocab_size
    attention = 2 * hidden * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    weights = layers * (attention + 3 * hidden * mlp + 2 * hidden) + hidden + vocabulary * hidden
    seconds = 2 * weights * 16 * 0.4 * 11 * 1000 / 0.4e6
    assert float(told[1]) * {"s": 1, "min": 60, "h": 3600}[told[2]] == pytest.approx(seconds, rel=0.02)


def test_check_tells_it(tmp_path: Path) -> None:
    config_of().save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(GOOD)
    arguments = ["check", str(tmp_path / "recipe.yaml"), "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(app, [*arguments, "--num-calibration-samples", "9"])
    assert result.exit_code == 0, result.output
    assert "depth search: 11 subnets on 4 sequences of 512 tokens, about" in result.stderr
