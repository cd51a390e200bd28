"""A search on an elastic checkpoint: by its profile, on text, and refused where either is of something else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.multiple_choice import load_questions
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.deployment import registry
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.asked import flows_of, subject_of
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.deployment.search.run import Asked, search_shapes
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError, BudgetError, PluginError
from amoeba_plugin.reports.frontier_table import notes_on
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, PerTokenLoss
from amoeba_plugin.testing.flows import tokenizer
from support.elastic_files import write_elastic
from support.toy_flow import Toy

HOW = Measuring((4, 8), 2, rounds=1, shapes=9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ElasticModel]:
    directory = tmp_path_factory.mktemp("search")
    live = write_elastic(directory)
    profile_model(
        subject_of(str(directory / "elastic"), None, [], []), {Point("toy", "deep"): Toy(directory)},
        directory / "profile.json", HOW, "a model", progress=False,
    )  # fmt: skip
    return directory, live


@pytest.fixture(autouse=True)
def toy(files: tuple[Path, ElasticModel], monkeypatch: pytest.MonkeyPatch):
    known = registry.flow_named
    monkeypatch.setattr(registry, "flow_named", lambda name: Toy(files[0]) if name == "toy" else known(name))


def found(files: tuple[Path, ElasticModel], budget: str, searcher: str = "exhaustive", **more: Any) -> Frontier:
    directory, _ = files
    asked = Asked(searcher, str(directory / "text.txt"), num_samples=4, max_seq_length=32, **more)
    return search_shapes(directory / "elastic", directory / "profile.json", budget, asked, progress=False)


def loaded(directory: Path) -> list[Batch]:
    return load_batches(
        str(directory / "text.txt"), tokenizer(), split="train", num_samples=4, max_seq_length=32, batch_size=8,
        vocab_size=512, seed=0,
    )  # fmt: skip


def test_the_best_shape_of_the_loss_that_the_model_has(files: tuple[Path, ElasticModel]):
    directory, live = files
    result = found(files, "toy:deep decode<=1.8ms")  # half a millisecond a layer, of two to four
    batches, losses = loaded(directory), {}
    for shape in live.space:
        if shape.depth <= 3:
            with live.active(shape) as model, torch.no_grad():
                losses[str(shape)] = PerTokenLoss().measure(model.eval(), batches).value
    assert {each.shape: each.quality.value for each in result.candidates} == pytest.approx(losses)
    assert result.chosen == min(losses, key=lambda shape: losses[shape])
    assert (result.evaluated, result.shapes) == (6, 9)
    assert [each.quality.value for each in result.candidates] == pytest.approx(sorted(losses.values()))
    assert all(each.quality.low < each.quality.value < each.quality.high for each in result.candidates)
    assert result.runner_up is not None
    assert result.runner_up.shape == sorted(losses, key=lambda shape: losses[shape])[1]
    result.save(directory / "frontier.json")
    assert Frontier.load(directory / "frontier.json") == result
    assert result.command(Path("E")) == f"amoeba deploy E --shape {result.chosen} --flow toy:deep -o OUT"


def test_shapes_are_judged_by_questions(files: tuple[Path, ElasticModel], tmp_path: Path):
    directory, live = files
    rows = [
        {"question": text[at : at + 20], "choices": [text[at + 20 : at + 24], "zq", "a b", ","], "answer": at % 4}
        for at, text in enumerate(shipped_texts().passages * 5)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = {"split": "train", "seed": 0, "letters": False, "max_seq_length": 200, "batch_size": 3, "vocab_size": 512}
    batches = load_questions(str(tmp_path / "questions.jsonl"), tokenizer(), num_questions=len(rows), **told)
    asked = Asked(
        "exhaustive", str(tmp_path / "questions.jsonl"), num_samples=len(rows), max_seq_length=200,
        evaluator="accuracy", letters=False,
    )  # fmt: skip
    result = search_shapes(
        directory / "elastic", directory / "profile.json", "toy:deep decode<=1s", asked, progress=False
    )
    wanted = {}
    for shape in live.space:
        with live.active(shape) as model:
            wanted[str(shape)] = MultipleChoiceAccuracy().measure(model, batches).value
    assert {each.shape: each.quality.value for each in result.candidates} == pytest.approx(wanted)
    assert len(set(wanted.values())) > 2
    assert wanted[result.chosen] == max(wanted.values())
    assert (result.evaluator, result.unit, result.larger_is_better) == ("accuracy", MultipleChoiceAccuracy.unit, True)
    assert "cannot be told apart" in " ".join(notes_on(result))


def test_an_interval_without_an_end_is_kept_in_the_file(files: tuple[Path, ElasticModel], tmp_path: Path):
    profile = Profile.load(files[0] / "profile.json")
    for shape in [shape for shape in profile.sizes if shape not in ("4x1", "2x1/2", "3x1")]:
        del profile.flows["toy:deep"].shapes[shape]  # three do not tell how far a fourth may be off
    profile.save(tmp_path / "profile.json")
    asked = Asked("exhaustive", str(files[0] / "text.txt"), num_samples=2, max_seq_length=32, measure=False)
    result = search_shapes(
        files[0] / "elastic", tmp_path / "profile.json", "toy:deep decode<=1.8ms", asked, progress=False
    )
    assert any(each.costs["decode"].high == math.inf for each in result.candidates)
    result.save(tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json") == result


def test_what_dominates_what_by_brute_force(files: tuple[Path, ElasticModel]):
    result = found(files, "toy:deep decode<=1s prefill[6]<=1s")
    for one in result.candidates:
        better = [
            other for other in result.candidates
            if other.quality.value < one.quality.value
            and all(other.costs[name].value <= cost.value for name, cost in one.costs.items())
        ]  # fmt: skip
        assert one.dominated == bool(better)


def test_a_shape_whose_interval_straddles_the_budget_is_run(files: tuple[Path, ElasticModel], tmp_path: Path):
    directory, _ = files
    profile = Profile.load(directory / "profile.json")
    for shape in [shape for shape in profile.sizes if shape not in ("4x1", "2x1/2", "4x1/2", "2x1", "3x3/4")]:
        del profile.flows["toy:deep"].shapes[shape]
    path = tmp_path / "profile.json"
    profile.save(path)
    before = {shape: len(cost.rounds) for shape, cost in profile.flows["toy:deep"].shapes.items()}
    asked = Asked("exhaustive", str(directory / "text.txt"), num_samples=2, max_seq_length=32)
    straddled = profile.flows["toy:deep"].shapes["3x3/4"].rounds[0].decode.cpu * 1e3
    result = search_shapes(directory / "elastic", path, f"toy:deep decode<={straddled:.6f}ms", asked, progress=False)
    after = {shape: len(cost.rounds) for shape, cost in Profile.load(path).flows["toy:deep"].shapes.items()}
    assert result.measured == len(after) - len(before)
    kept = next(each for each in result.candidates if each.shape == result.chosen)
    assert kept.costs["decode"].measured


def test_profiles_and_budgets_that_do_not_fit_are_refused(files: tuple[Path, ElasticModel], tmp_path: Path):
    directory, _ = files
    with pytest.raises(BudgetError, match=r"keeps toy:deep decode<=0.001ms: the nearest, 2x.*, takes decode"):
        found(files, "toy:deep decode<=1us")
    with pytest.raises(
        ArtifactError, match=r"knows nothing of toy:wide, only of toy:deep; add it: .* --flow toy:wide -o"
    ):
        found(files, "toy:wide decode<=1ms")
    with pytest.raises(BudgetError, match="has none longer than 8"):
        found(files, "toy:deep prefill[9]<=1s")
    with pytest.raises(PluginError, match="no searcher named 'exhausting'. Did you mean 'exhaustive'"):
        found(files, "toy:deep decode<=1ms", "exhausting")
    with pytest.raises(PluginError, match="no evaluator named 'lost'. Did you mean 'loss'. Known: accuracy, loss"):
        found(files, "toy:deep decode<=1ms", evaluator="lost")
    profile = Profile.load(directory / "profile.json")
    other = tmp_path / "other.json"
    profile.model_copy(update={"digest": "another"}).save(other)
    asked = Asked("exhaustive", str(directory / "text.txt"))
    with pytest.raises(ArtifactError, match="of another model"):
        search_shapes(directory / "elastic", other, "toy:deep decode<=1ms", asked)
    (tmp_path / "frontier.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not a result of a search"):
        Frontier.load(tmp_path / "frontier.json")


def test_shape_and_scheme_are_chosen_together(files: tuple[Path, ElasticModel], tmp_path: Path):
    directory, live = files
    path = tmp_path / "profile.json"
    flows = flows_of(["torch:fp32", "torch:bf16"])
    subject = subject_of(str(directory / "elastic"), None, [], [])
    profile_model(subject, flows, path, Measuring((4,), 2, rounds=1, shapes=9), "a model", progress=False)
    sizes = {
        point: {shape: cost.bytes for shape, cost in flow.shapes.items()}
        for point, flow in Profile.load(path).flows.items()
    }
    most = (sizes["torch:fp32"]["2x1"] + sizes["torch:bf16"]["4x1"]) / 2
    asked = Asked("exhaustive", str(directory / "text.txt"), num_samples=4, max_seq_length=32, finalists=2)
    budget = f"torch:fp32,bf16 file<={most:.0f}B"
    result = search_shapes(directory / "elastic", path, budget, asked, progress=False)
    for each in result.candidates:
        assert each.costs["file"].value == sizes[each.flow][each.shape]
        assert each.keeps == (sizes[each.flow][each.shape] <= most)
    assert {each.flow for each in result.candidates if each.keeps} == {"torch:fp32", "torch:bf16"}
    harmed = [each for each in result.candidates if each.harm is not None]
    assert {each.flow for each in harmed} == {"torch:bf16"}
    assert len(harmed) == result.finalists <= 3  # the one that tells whether bf16 is worth it, and two more
    final = [each for each in result.candidates if each.keeps and (each.harm or each.flow == "torch:fp32")]
    assert result.best.quality.value == min(each.quality.value for each in final)
    batches = loaded(directory)
    for each in harmed:
        with live.active(each.shape) as model, torch.no_grad():
            whole = PerTokenLoss().measure(model.eval(), batches).value
        assert each.quality.value == pytest.approx(whole + each.harm.value)
        assert each.deploy == f"amoeba deploy {directory / 'elastic'} --shape {each.shape} --flow torch:bf16 -o OUT"
    assert result.command(Path("E")) == f"amoeba deploy E --shape {result.chosen} --flow {result.flow} -o OUT"
    assert Frontier.model_validate_json(result.model_dump_json()) == result


def test_the_command(files: tuple[Path, ElasticModel], tmp_path: Path):
    directory, _ = files
    out = tmp_path / "frontier.json"
    on = ["search", str(directory / "elastic"), "--profile", str(directory / "profile.json"), "-o", str(out)]
    text = ["--dataset", str(directory / "text.txt"), "--num-samples", "2", "--max-seq-length", "32"]
    result = CliRunner().invoke(app, [*on, *text, "--budget", "toy:deep decode<=1.8ms"])
    assert result.exit_code == 0, result.output
    chosen = Frontier.load(out).chosen
    assert chosen in result.stdout
    assert f"--shape {chosen} --flow toy:deep" in result.stderr
    wrong = CliRunner().invoke(app, [*on, *text, "--budget", "toy:deep decode<=1.8"])
    assert wrong.exit_code == 2
    assert "the unit is missing" in wrong.stderr
