"""A profile is measured by processes of a toy engine: extended, gone on with, and refused where it is foreign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.deployment import registry
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.flow import DeploymentFlow, Point
from amoeba_plugin.deployment.profiling.asked import prompts_of, subject_of
from amoeba_plugin.deployment.profiling.measure import Measuring, measure_shapes, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.table import disagreements, rows
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.errors import ArtifactError, DeploymentError, RecipeError, ShapeError
from amoeba_plugin.reports.profile_plot import drawn
from amoeba_plugin.reports.profile_table import notes_on, tables_of
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.testing.flows import CONFIG
from support.checkpoints import save_random
from support.models import make_tiny_model
from support.toy_flow import Toy

SPACE = ShapeSpace((4, 3, 2), (Fraction(1), Fraction(3, 4), Fraction(1, 2)))
HOW = Measuring(prompts=(4, 8), decoded=2, rounds=2)


@pytest.fixture
def subject() -> Subject:
    return Subject.of(AutoConfig.for_model(**CONFIG), SPACE)


@pytest.fixture
def toy(tmp_path: Path) -> Mapping[Point, DeploymentFlow]:
    return {Point("toy", scheme): Toy(tmp_path) for scheme in ("deep", "wide")}


def test_some_shapes_are_measured_and_all_are_told(
    subject: Subject, toy: Mapping[Point, DeploymentFlow], tmp_path: Path
):
    path = tmp_path / "profile.json"
    found = profile_model(subject, toy, path, HOW, "a model", progress=False)
    assert Profile.load(path) == found
    assert set(found.flows) == {"toy:deep", "toy:wide"}
    measured = found.flows["toy:deep"].shapes
    assert len(measured) == 8  # at least so many, of nine
    assert {"4x1", "2x1/2"} <= set(measured)
    assert all(len(cost.rounds) == 2 for cost in measured.values())
    for row in rows(found, "toy:deep"):
        shape = SubnetShape.parse(row.shape)
        assert row.decode.value == pytest.approx(shape.depth * 0.5, rel=0.3)
        assert row.prefill[8].value > row.prefill[4].value
        assert row.decode.measured == (row.shape in measured)
    told = " ".join(notes_on(found))
    assert "toy:deep decode is faster at" in told  # the one goes by layers, the other by neurons
    assert {pair[0] for pair in disagreements(found)} >= {"toy:deep decode"}
    assert [len(table.rows) for table in tables_of(found)] == [9, 9]
    _shows_what_was_found(found)


def _shows_what_was_found(found: Profile) -> None:
    """Every shape is in its row and column, with its share of the whole model's time, in bold where it was measured."""
    panels = drawn(found).axes
    assert [each.get_title() for each in panels] == [
        f"toy:{scheme} {phase}" for scheme in ("deep", "wide") for phase in ("prefill[8]", "decode")
    ]
    for axes in panels:
        flow, _, phase = axes.get_title().partition(" ")
        depths, widths = ([label.get_text() for label in of] for of in (axes.get_yticklabels(), axes.get_xticklabels()))
        told = {
            f"{depths[round(y)]}x{widths[round(x)]}": (text.get_text(), text.get_fontweight())
            for text in axes.texts for x, y in [text.get_position()]
        }  # fmt: skip
        costs = {row.shape: row.decode if phase == "decode" else row.prefill[8] for row in rows(found, flow)}
        assert told == {
            shape: (f"{cost.value / costs['4x1'].value:.0%}", "bold" if cost.measured else "normal")
            for shape, cost in costs.items()
        }
        framed = {f"{depths[round(y + 0.44)]}x{widths[round(x + 0.46)]}" for x, y in (box.xy for box in axes.patches)}
        assert framed == {shape for pair in disagreements(found) for shape in (pair[1], pair[3])}


def test_what_is_known_is_not_measured_again_and_what_is_missing_is(
    subject: Subject, toy: Mapping[Point, DeploymentFlow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "profile.json"
    deep = {Point("toy", "deep"): toy[Point("toy", "deep")]}
    profile_model(subject, deep, path, Measuring((4, 8), 2, rounds=1, shapes=3), "a model", progress=False)
    before = Profile.load(path).flows["toy:deep"].shapes
    assert len(before) == 3
    after = profile_model(subject, toy, path, Measuring((4, 8), 2, rounds=2, shapes=4), "a model", progress=False)
    kept = after.flows["toy:deep"].shapes
    assert {shape: cost.rounds[0] for shape, cost in kept.items() if shape in before} == {
        shape: cost.rounds[0] for shape, cost in before.items()
    }
    assert [len(kept[shape].rounds) for shape in kept] == [2] * len(kept)
    monkeypatch.setattr(EngineProcess, "ask", pytest.fail)
    same = profile_model(subject, toy, path, Measuring((4, 8), 2, rounds=2, shapes=4), "a model", progress=False)
    assert same == after


def test_what_is_measured_later_is_told_at_the_speed_of_the_profile(subject: Subject, tmp_path: Path):
    """The machine is three times as slow by then, and the shape costs what it would have cost before."""
    path, toy = tmp_path / "profile.json", Toy(tmp_path)
    point, few = Point("toy", "deep"), replace(HOW, shapes=2)
    profile = profile_model(subject, {point: toy}, path, few, "a model", progress=False)
    assert set(profile.flows["toy:deep"].shapes) == {"4x1", "2x1/2"}
    toy.slower = 3
    again = replace(HOW, prompts=(4, 6, 8))  # one more than the profile knows
    measure_shapes(subject, {point: toy}, profile, path, again, [SubnetShape.parse("3x1")])
    known = Profile.load(path).flows["toy:deep"].shapes
    assert [len(each.rounds) for each in known.values()] == [2, 2, 2]
    assert known.keys() == {"4x1", "2x1/2", "3x1"}
    largest = known["4x1"].least
    for each in known["3x1"].rounds:
        assert each.decode.cpu == pytest.approx(largest.decode.cpu * 3 / 4, rel=0.2)
        assert each.prefill[8].cpu == pytest.approx(largest.prefill[8].cpu * 3 / 4, rel=0.25)
        assert each.prefill[6].cpu < each.prefill[8].cpu


def test_an_engine_that_fails_leaves_what_was_measured(subject: Subject, tmp_path: Path):
    path, point = tmp_path / "profile.json", Point("toy", "deep")
    short = Measuring((4, 8), 2, rounds=1, shapes=3)
    profile_model(subject, {point: Toy(tmp_path)}, path, short, "a model", progress=False)
    before = path.read_bytes()
    with pytest.raises(DeploymentError, match=r"toy failed \(load\): MemoryError: too deep"):
        profile_model(subject, {point: Toy(tmp_path, fails_at=4)}, path, HOW, "a model", progress=False)
    assert path.read_bytes() == before


def test_profiles_of_others_are_refused(subject: Subject, toy: Mapping[Point, DeploymentFlow], tmp_path: Path):
    path = tmp_path / "profile.json"
    short = Measuring((4, 8), 2, rounds=1, shapes=2)
    profile_model(subject, toy, path, short, "a model", progress=False)
    larger = Subject.of(AutoConfig.for_model(**{**CONFIG, "intermediate_size": 512}), SPACE)
    with pytest.raises(ArtifactError, match="of another model"):
        profile_model(larger, toy, path, short, "another", progress=False)
    with pytest.raises(ArtifactError, match="measure the same, or name another file"):
        profile_model(subject, toy, path, Measuring((4, 8), 3, shapes=2), "a model", progress=False)
    document = json.loads(path.read_text())
    document["machine"]["cpu"] = "Another CPU"
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="is of another machine.*--foreign"):
        Profile.load(path)
    assert Profile.load(path, foreign=True).machine["cpu"] == "Another CPU"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match="is not a profile, damaged"):
        Profile.load(path)
    with pytest.raises(ArtifactError, match="there is no profile"):
        Profile.load(tmp_path / "nothing.json")
    with pytest.raises(DeploymentError, match="do not fit the model, which has room for 512"):
        profile_model(subject, toy, path, Measuring((512,), 2), "a model", progress=False)


def test_shapes_of_random_weights_have_the_sizes_of_a_strategy(tmp_path: Path):
    live = save_random(make_tiny_model("llama"), tmp_path)
    subject = subject_of(str(tmp_path / "elastic"), None, [], [])
    assert list(subject.space) == list(live.space)
    (tmp_path / "random").mkdir()
    elastic, _ = load_elastic(subject.save_elastic(tmp_path / "random"))
    for shape in live.space:
        assert elastic.plan.sizes(shape) == live.plan.sizes(shape)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = registry.flow_named
    monkeypatch.setattr(registry, "flow_named", lambda name: Toy(tmp_path) if name == "toy" else known(name))
    make_tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "base")
    model = ("profile", str(tmp_path / "base"))
    on = (*model, "-o", str(tmp_path / "profile.json"), "--plot", str(tmp_path / "profile.svg"))
    small = ("--prompts", "4,8", "--decoded", "2", "--rounds", "1")
    result = CliRunner().invoke(app, [*on, "--flow", "toy:deep", "--depths", "4,2", "--widths", "1,1/2", *small])
    assert result.exit_code == 0, result.output
    assert "2x1/2" in result.stdout
    assert "profile of 4 shapes" in result.stderr
    assert ">toy:deep decode<" in (tmp_path / "profile.svg").read_text()
    for wrong, said in (
        (["--flow", "toy"], "names no scheme"),
        (["--flow", "toy:deep", "--prompts", "many"], "'many' is no length of a prompt"),
        (["--flow", "toy:deep", "--widths", "2"], "width 2"),
        (["--flow", "toy:deep", "--depths", "5"], "more layers than the model"),
        (["--flow", "toy:deep", "--prompts", "200"], "do not fit the model, which has room for 128"),
    ):
        result = CliRunner().invoke(app, [*model, "-o", str(tmp_path / "other.json"), *wrong])
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    assert not (tmp_path / "other.json").exists()


def test_prompts_fit_the_model_where_none_are_asked_for(subject: Subject):
    assert prompts_of([], subject, 16) == (32, 128, 256)
    subject.config.max_position_embeddings = 128
    assert prompts_of([], subject, 16) == (14, 56, 112)
    assert prompts_of(["8", "4", "8"], subject, 16) == (4, 8)


def test_a_strategy_has_a_space_of_its_own(tmp_path: Path):
    save_random(make_tiny_model("llama"), tmp_path)
    with pytest.raises(RecipeError, match="leave out --depths"):
        subject_of(str(tmp_path / "elastic"), None, ["4"], [])
    with pytest.raises(ShapeError):
        subject_of(str(tmp_path / "base"), None, ["four"], [])
