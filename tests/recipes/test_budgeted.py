"""Recipes that take the best shape within a budget: refused before the model loads, or cut at what a search finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from amoeba_plugin.data.text import load_batches
from amoeba_plugin.deployment import registry
from amoeba_plugin.deployment.profiling import measure
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.errors import AmoebaError, ArtifactError, BudgetError, RecipeError
from amoeba_plugin.recipes.budgeted import expected_works
from amoeba_plugin.recipes.check import check_recipe
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.recipes.run import run_recipe
from amoeba_plugin.selection.objectives import PerTokenLoss
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model
from support.recipes import config_of, recipe
from support.toy_flow import Toy

SELECT = {
    "DepthShrinkingModifier": {"min_depth": 2, "selector": "last_layers", "repair": "none"},
    "WidthShrinkingModifier": {"widths": ["1", "1/2"], "allocation": "uniform", "repair": "none"},
}
OPTIONS = RunOptions(num_samples=4, max_seq_length=32, dtype="float32")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and text, in which the toy engine can be named."""
    random_model(CONFIG).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name in ("text", "held_out"):
        (tmp_path / f"{name}.txt").write_text(
            "\n".join(sorted(shipped_texts().passages, key=len, reverse=name == "text"))
        )
    known = registry.flow_named
    monkeypatch.setattr(registry, "flow_named", lambda name: Toy(tmp_path) if name == "toy" else known(name))
    monkeypatch.setattr(measure, "ENOUGH", 0)  # times of the toy need no repetition
    monkeypatch.chdir(tmp_path)
    return tmp_path


def budgeted(place: Path, name: str = "recipe.yaml", search: dict[str, object] | None = None, **limits: str) -> str:
    cut: dict[str, object] = {"budget": {"flow": "toy:deep", **limits}}
    if search is not None:
        cut["search"] = search
    (place / name).write_text(recipe(SELECT, {"SubnetExtractionModifier": cut}))
    return str(place / name)


def run(place: Path, text: str, output: str = "out") -> Path:
    run_recipe(text, str(place / "model"), str(place / "text.txt"), place / output, OPTIONS)
    return place / output


def test_the_best_shape_that_keeps_the_budget_is_cut(place: Path):
    held_out = {"dataset": "held_out.txt", "num_samples": 4, "max_seq_length": 32, "searcher": "exhaustive"}
    out = run(place, budgeted(place, search={**held_out, "frontier": "found.json"}, decode="1.8ms"))
    found = Frontier.load(place / "found.json")
    assert {each.shape for each in found.candidates} == {"3x1", "3x1/2", "2x1", "2x1/2"}  # half a ms a layer
    batches = load_batches(
        "held_out.txt", tokenizer(), split="train", num_samples=4, max_seq_length=32, batch_size=8, vocab_size=512,
        seed=0,
    )  # fmt: skip
    losses = {}
    for shape in ("3x1", "3x1/2", "2x1", "2x1/2"):
        cut = recipe(SELECT, {"SubnetExtractionModifier": {"shape": shape}})
        (place / "cut.yaml").write_text(cut)
        subnet = AutoModelForCausalLM.from_pretrained(run(place, str(place / "cut.yaml"), shape.replace("/", "_")))
        with torch.no_grad():
            losses[shape] = PerTokenLoss().measure(subnet.eval(), batches).value
    assert {each.shape: each.quality.value for each in found.candidates} == pytest.approx(losses, abs=1e-5)
    best = min(losses, key=lambda shape: losses[shape])
    assert found.chosen == best
    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    (fields,) = [
        each["SubnetExtractionModifier"]
        for s in saved.values()
        for each in s.values()
        if "SubnetExtractionModifier" in each
    ]
    assert fields["shape"] == best
    assert not fields.get("budget")
    plan_recipe(out / "recipe.yaml")  # it can be run again
    assert "the best within toy:deep decode<=1.8ms" in (out / "README.md").read_text()
    assert (place / "amoeba_profile.json").is_file()
    again = run_recipe(str(place / "recipe.yaml"), str(place / "model"), str(place / "text.txt"), out, OPTIONS)
    assert not again.is_new


def test_without_text_of_its_own_calibration_rows_judge(place: Path):
    out = run(place, budgeted(place, search={"searcher": "exhaustive"}, decode="1.3ms"))
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 2


def test_a_budget_that_no_shape_keeps_is_refused_before_the_model_loads(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("amoeba_plugin.recipes.run.execute", None)
    with pytest.raises(
        BudgetError, match=r"recipe.yaml, line \d+: .*: no shape keeps .*: the nearest, 2x1.*, takes decode 1"
    ):
        run(place, budgeted(place, decode="0.2ms"))
    assert not (place / "out").exists()
    assert Profile.load(place / "amoeba_profile.json").flows.keys() == {"toy:deep"}  # stays for the next try


def test_a_profile_that_is_there_is_read_or_extended(place: Path):
    text = budgeted(place, decode="0.2ms")
    for _ in range(2):
        with pytest.raises(BudgetError):
            run(place, text)
    before = Profile.load(place / "amoeba_profile.json")
    rounds = {name: len(cost.rounds) for name, cost in before.flows["toy:deep"].shapes.items()}
    assert set(rounds.values()) == {5}
    with pytest.raises(BudgetError):
        run(place, budgeted(place, decode="0.2ms", flow="toy:wide"))
    assert Profile.load(place / "amoeba_profile.json").flows.keys() == {"toy:deep", "toy:wide"}
    before.model_copy(update={"digest": "another"}).save(place / "amoeba_profile.json")
    with pytest.raises(ArtifactError, match="SubnetExtractionModifier: .* is a profile of another model"):
        run(place, text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": {"flow": "toy:deep", "decode": "12"}}, "'decode<=12': the unit is missing"),
        ({"budget": {"decode": "12ms"}}, "names no flow; write flow: llama-cpp:Q4_0"),
        ({"budget": {"flow": "toy:deep"}}, "limits nothing"),
        ({"budget": {"flow": "toy:deep", "prefill": "12ms"}}, "how long a prompt"),
        ({"budget": {"flow": "toy:deep", "decode": "12ms"}, "shape": "2x1"}, "cuts one subnet; give shape"),
        ({"shape": "2x1", "search": {"searcher": "exhaustive"}}, "give a budget, or leave it out"),
        (
            {"budget": {"flow": "toy:deep", "decode": "9ms"}, "search": {"searchr": "x"}},
            "search: 'searchr' is no field",
        ),
    ],
)
def test_fields_that_say_no_budget_are_refused_with_their_line(fields: dict[str, object], message: str):
    with pytest.raises(RecipeError, match=r"line \d+: SubnetExtractionModifier") as refused:
        plan_recipe(recipe(SELECT, {"SubnetExtractionModifier": fields}))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("limits", "search", "message"),
    [
        ({"flow": "toi:deep"}, {}, "no deployment flow named 'toi'"),
        ({"flow": "toy:dep"}, {}, "toy has no scheme 'dep'. Did you mean 'deep'"),
        ({}, {"searcher": "exhausting"}, "no searcher named 'exhausting'"),
        ({}, {"dataset": "nowhere.txt"}, "nowhere.txt: no such file"),
    ],
)
def test_what_a_search_needs_is_asked_for_before_anything_is_measured(
    place: Path, limits: dict[str, str], search: dict[str, object], message: str
):
    text = budgeted(place, search=search, **{"decode": "9ms", **limits})
    for ask in (lambda: check_recipe(text, str(place / "model")), lambda: run(place, text)):
        with pytest.raises(AmoebaError) as refused:
            ask()
        assert message in str(refused.value)
    assert not (place / "amoeba_profile.json").exists()


def test_the_check_says_what_is_known(place: Path):
    text = budgeted(place, decode="1.8ms")
    assert "is measured first, into amoeba_profile.json" in check_recipe(text, str(place / "model")).costs[-1]
    with pytest.raises(BudgetError):
        run(place, budgeted(place, "small.yaml", decode="0.2ms"))
    assert (
        check_recipe(text, str(place / "model")).costs[-1].startswith("4 of 6 shapes may keep toy:deep decode<=1.8ms")
    )
    document = json.loads((place / "amoeba_profile.json").read_text())
    (place / "amoeba_profile.json").write_text(json.dumps(document | {"machine": {"cpu": "another"}}))
    with pytest.raises(ArtifactError, match="is of another machine"):
        check_recipe(text, str(place / "model"))


def test_the_shapes_there_will_be():
    def shapes(depth: dict[str, object], width: dict[str, object]) -> set[str]:
        steps = {"DepthShrinkingModifier": depth, "WidthShrinkingModifier": width}
        plan = plan_recipe(recipe(steps, {"SubnetExtractionModifier": {"budget": {"flow": "a:b", "load": "1s"}}}))
        return {str(shape) for shape in expected_works(plan, plan.against(config_of()))}

    assert shapes({"min_depth": 3}, {"widths": ["1", "3/4"]}) == {"4x1", "4x3/4", "3x1", "3x3/4"}
    assert shapes({"depths": [2]}, {"widths": ["1"]}) == {"4x1", "2x1"}
    assert shapes({"min_depth": 2, "kept_layers": {"2": [0, 3]}}, {"widths": ["1"]}) == {"4x1", "2x1"}
    assert shapes({"min_depth": 2}, {"totals": ["1/2"]}) == {"4x1", "4x1/2", "3x1", "3x2/3", "2x1"}
