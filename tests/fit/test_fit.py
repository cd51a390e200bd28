"""From a model and a budget to what an engine runs, in one call: its parts, its ends, and what it refuses."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.deployment import within
from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.measure import Measuring
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.search import preflight
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.errors import AmoebaError, ArtifactError, BudgetError, DataError, DeploymentError
from amoeba_plugin.fit import run
from amoeba_plugin.fit.data import part_text
from amoeba_plugin.fit.needs import bytes_in
from amoeba_plugin.fit.result import FitOptions
from amoeba_plugin.fit.run import fit_model, plan_fit
from amoeba_plugin.selection import kept_steps
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model

pytestmark = pytest.mark.xdist_group("fit")  # two fits serve all
OPTIONS = FitOptions(steps=2, num_samples=4, max_seq_length=32)
ALONE = FitOptions(steps=0, num_samples=4, max_seq_length=32)
BUDGET = "torch:fp32 file<=3.1MB load<=9s"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fit")
    random_model(CONFIG).save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    passages = list(shipped_texts().passages)
    rows = [{"text": f"{number}: {passages[number % len(passages)]}"} for number in range(120)]
    (directory / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def fit(place: Path, output: Path, budget: str = BUDGET, options: FitOptions = ALONE):
    return fit_model(str(place / "model"), str(place / "text.jsonl"), budget, output, options)


@pytest.fixture(scope="module", autouse=True)
def profiled(place: Path) -> Iterator[None]:
    """Measure the model once: every fit finds its profile."""
    known, measure = place / "profile.json", run.profile_for

    def found(budget: Budget, subject: Subject, path: Path, name: str) -> Profile:
        if known.is_file():
            shutil.copy(known, path)
        result = measure(budget, subject, path, name)
        shutil.copy(path, known)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "Measuring", functools.partial(Measuring, rounds=1, shapes=6))
        patch.setattr(run, "profile_for", found)
        yield


@pytest.fixture(scope="module")
def fitted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fitted") / "out"
    fit(place, output, options=OPTIONS)
    return output


@pytest.fixture(scope="module")
def stopped(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit that was stopped behind its recipe."""

    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "deploy_best", stop)
        with pytest.raises(StoppedError):
            fit(place, output)
    return output


def undeployed(output: Path) -> Path:
    """Take back what follows the recipe."""
    for name in ("fit.json", "deployed.json"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "deployed", ignore_errors=True)
    return output


def test_what_is_deployed_is_the_best_within_the_budget_and_computes_the_same(fitted: Path):
    found = Frontier.load(fitted / "frontier.json")
    values = {each.shape: each.quality.value for each in found.candidates if each.keeps}
    assert values
    assert found.chosen == min(values, key=lambda shape: values[shape])
    deployed = sum(each.stat().st_size for each in (fitted / "deployed").glob("*.safetensors"))
    assert 0 < deployed <= 3.1e6
    subnet = AutoModelForCausalLM.from_pretrained(fitted / "deployed", dtype=torch.float32).eval()
    live, adapter = load_elastic(fitted / "elastic")
    assert adapter is not None
    tokens = torch.arange(20)[None]
    with torch.no_grad(), live.active(live.space.require(found.chosen)) as model:
        torch.testing.assert_close(subnet(tokens).logits, model.eval()(tokens).logits, atol=2e-4, rtol=1e-3)


def test_the_page_tells_what_was_taken_tried_and_measured(fitted: Path):
    text, found = (fitted / "report.html").read_text(), Frontier.load(fitted / "frontier.json")
    for each in found.candidates:
        assert f'<td class="name">{each.shape}</td>' in text
    for figure in ("Quality over costs, with the budget", "Time over depth and width"):
        assert text.count(f'aria-label="{figure}"') == 1
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert str(fitted / "deployed") in text
    assert "<script" not in text


def test_the_same_again_computes_nothing(place: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "run_recipe", None)
    before = (fitted / "fit.json").read_bytes()
    told = CliRunner().invoke(app, [
        "fit", str(place / "model"), "--dataset", str(place / "text.jsonl"), "--budget", BUDGET, "-o", str(fitted),
        "--steps", "2", "--num-calibration-samples", "4", "--max-seq-length", "32",
    ])  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "loss on text that nothing saw" in " ".join(told.output.split())
    assert "AutoModelForCausalLM.from_pretrained" in told.output  # how to run what was deployed
    assert (fitted / "fit.json").read_bytes() == before
    with pytest.raises(ArtifactError, match=r"of another fit \(budget torch:fp32 file"):
        fit(place, fitted, "torch:fp32 file<=3MB", OPTIONS)


def test_the_recipe_that_was_written_gives_the_same_subnet_again(fitted: Path, tmp_path: Path):
    told = (fitted / "recipe.yaml").read_text().splitlines()[1]
    command = shlex.split(told.removeprefix("#   amoeba ").replace("OTHER", str(tmp_path / "subnet")))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    again, first = (next(each.glob("*.safetensors")).read_bytes() for each in (tmp_path / "subnet", fitted / "subnet"))
    assert again == first


def test_a_fit_that_was_stopped_goes_on(place: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("amoeba_plugin.recipes.run.execute", None)  # was done
    result = fit(place, undeployed(stopped))
    assert result.deployed.shape == Frontier.load(stopped / "frontier.json").chosen
    assert not (stopped / "elastic" / "adapter").exists()  # nothing was trained


def test_a_fit_that_was_stopped_in_its_selection_goes_on_there(
    place: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class StoppedError(Exception):
        pass

    def stop(path: Path, data: bytes):
        write(path, data)
        if path.name == "width_7-8.json":
            raise StoppedError

    output, write = tmp_path / "out", kept_steps.write_atomically
    with monkeypatch.context() as patch:
        patch.setattr(kept_steps, "write_atomically", stop)
        with pytest.raises(StoppedError):
            fit(place, output)
    kept = {each.name for each in (output / "selection").iterdir()}
    assert {"depth_search.json", "ranking.json", "folds_3.json", "width_7-8.json"} <= kept
    assert "width_3-4.json" not in kept
    with monkeypatch.context() as patch:
        patch.setattr("amoeba_plugin.modifiers.width.collect_moments", None)  # was done
        patch.setattr("amoeba_plugin.selection.repair.depth.run_watched", None)
        fit(place, output)
    again, first = (next((each / "elastic").glob("*.safetensors")).read_bytes() for each in (output, stopped))
    assert again == first
    assert not (output / "selection").exists()
    assert not (stopped / "selection").exists()


def test_where_an_engine_refuses_the_best_the_next_one_is_taken(
    place: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    deploy, tried = within.deploy_shape, []

    def refuse_first(elastic: Path, shape: str, flow: str, output: Path, base: str | None):
        tried.append(shape)
        if len(tried) == 1:
            raise DeploymentError("it is too odd")
        return deploy(elastic, shape, flow, output, base)

    monkeypatch.setattr(within, "deploy_shape", refuse_first)
    result = fit(place, undeployed(stopped))
    found = [each.shape for each in Frontier.load(stopped / "frontier.json").candidates if each.keeps]
    assert tried == found[:2]
    assert result.deployed.shape == found[1]
    assert [(each.shape, each.why) for each in result.deployed.skipped] == [(found[0], "it is too odd")]
    page = (stopped / "report.html").read_text("utf-8")
    assert f"<dt>{found[0]} at {result.deployed.flow}</dt><dd>it is too odd</dd>" in page


def test_a_dry_run_stops_behind_the_recipe(place: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = ["fit", str(place / "model"), "--dataset", str(place / "text.jsonl"), "--budget", BUDGET, "-o", str(out)]
    rows = ["--num-calibration-samples", "4", "--max-seq-length", "32", "--no-training"]
    result = CliRunner().invoke(app, [*command, *rows, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert {each.name for each in out.iterdir()} == {"asked.json", "data", "profile.json", "recipe.yaml"}
    told = " ".join(result.output.split())
    assert "shapes may keep torch:fp32 file<=3.1MB load<=9000ms" in told
    assert "max_steps: 0 " in (out / "recipe.yaml").read_text()
    assert CliRunner().invoke(app, [*command, "--no-training", "--steps", "2"]).exit_code == 2


def test_a_smaller_space_is_taken_where_the_first_holds_nothing(place: Path, tmp_path: Path):
    planned = plan_fit(
        str(place / "model"), str(place / "text.jsonl"), "torch:fp32 file<=1.5MB", tmp_path / "out", ALONE
    )
    assert 'min_depth: "1/2"' in planned.recipe.read_text()
    with pytest.raises(BudgetError, match="no shape keeps torch:fp32 file<=0.1MB: the nearest, 2x1/4, takes file"):
        plan_fit(str(place / "model"), str(place / "text.jsonl"), "torch:fp32 file<=0.1MB", tmp_path / "other", ALONE)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("torch:elastic decode<=1s", "runs the elastic checkpoint as it is"),
        ("torch:fp32 decode<=1", "the unit is missing"),
        ("tourch:fp32 decode<=1s", "Did you mean 'torch'"),
    ],
)
def test_what_cannot_be_leaves_nothing(place: Path, tmp_path: Path, budget: str, message: str):
    with pytest.raises(AmoebaError) as refused:
        fit(place, tmp_path / "out", budget)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").write_text("")
    with pytest.raises(ArtifactError, match="is not empty"):
        fit(place, tmp_path)


@pytest.mark.parametrize("kind", ["rows", "one text"])
def test_parts_share_nothing_and_lose_nothing(tmp_path: Path, kind: str):
    lines = [f"line {number} {'x' * (number % 97)}" for number in range(3000)]
    if kind == "rows":
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        parts = part_text(str(tmp_path / "text.jsonl"), "train", None, tmp_path / "parts")
    else:
        (tmp_path / "text.txt").write_text("\n".join(lines))
        parts = part_text(str(tmp_path / "text.txt"), "train", None, tmp_path / "parts")
    found = {name: "\n".join(load_from_disk(str(path))["text"]).split("\n") for name, path in parts.items()}
    found = {name: [line for line in of if line] for name, of in found.items()}
    assert sorted(line for of in found.values() for line in of) == sorted(lines)
    assert all(len(found[name]) > 0.05 * len(lines) for name in ("judge", "report"))


def test_too_little_text_is_refused(tmp_path: Path):
    (tmp_path / "text.txt").write_text("a few words")
    with pytest.raises(DataError, match="too few to be parted"):
        part_text(str(tmp_path / "text.txt"), "train", None, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_dry_run_tells_memory_and_disk(place: Path, fitted: Path, tmp_path: Path):
    """The disk that was told is no less than what a fit took; the file is what the budget allows at most."""
    planned = plan_fit(str(place / "model"), str(place / "text.jsonl"), BUDGET, tmp_path / "out", OPTIONS)
    told = planned.needs.disk.written
    for name, directories in {
        "the strategy with repaired weights": ["elastic"], "the subnet": ["subnet"], "what is deployed": ["deployed"],
        "the training's checkpoints": ["checkpoints"], "the text": ["data"],
    }.items():  # fmt: skip
        adapter = told["the adapter"] if name.startswith("the strategy") else 0
        assert sum(bytes_in(fitted / each) for each in directories) <= told[name] + adapter
    assert "the selection's steps" not in told  # which are gone behind the recipe
    assert planned.needs.disk.temporary >= bytes_in(fitted / "subnet")  # it is cut again, to be deployed
    assert any(line.startswith("memory: about") for line in planned.told)
    assert any(line.startswith("disk: at most") for line in planned.told)


@pytest.mark.parametrize("before", ["nothing", "an empty directory"])
def test_a_disk_without_room_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
):
    out = tmp_path / "out"
    if before != "nothing":
        out.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=2_000_000))
    command = ["fit", str(place / "model"), "--dataset", str(place / "text.jsonl"), "--budget", BUDGET, "-o", str(out)]
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 2
        told = " ".join(result.output.split())
        assert re.search(r"is too full: about [\d.]+ MB are needed there, and 2\.0 MB are free", told), told
        assert "nothing was written" in told
    assert out.exists() == (before != "nothing")
    assert not out.exists() or not list(out.iterdir())
