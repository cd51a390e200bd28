"""From a budget to what an engine runs, in one call: the best shape that keeps it, deployed."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.deployment.profiling.measure import Measuring
from amoeba_plugin.deployment.search import preflight
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.selection.objectives import PerTokenLoss
from amoeba_plugin.testing.flows import tokenizer
from support.elastic_files import write_elastic


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("within")
    write_elastic(directory)
    return directory


def deploy(place: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["deploy", str(place / "elastic"), *options])
    return result.exit_code, " ".join(result.output.split())


def test_the_best_shape_within_a_budget_is_deployed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "Measuring", functools.partial(Measuring, rounds=1, shapes=9))
    most = 3_000_000
    profile, out = tmp_path / "profile.json", tmp_path / "out"
    code, told = deploy(
        place, "--budget", f"torch:fp32 file<={most}B", "--dataset", str(place / "text.txt"), "--profile", str(profile),
        "-o", str(out),
    )  # fmt: skip
    assert code == 0, told
    assert profile.is_file()
    taken = json.loads((out / "parity.json").read_text())
    assert sum(taken["files"].values()) <= most
    live, _ = load_elastic(place / "elastic")
    batches = load_batches(
        str(place / "text.txt"), tokenizer(), split="train", num_samples=32, max_seq_length=256, batch_size=8,
        vocab_size=512, seed=0,
    )  # fmt: skip
    losses = {}
    for shape in ("4x3/4", "3x1", "2x1", taken["opening"]["shape"]):  # of each depth the widest of 3 MB
        with live.active(live.space.require(shape)) as model, torch.no_grad():
            losses[shape] = PerTokenLoss().measure(model.eval(), batches).value
    assert taken["opening"]["shape"] == min(losses, key=lambda shape: losses[shape])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--shape", "3x1"],
        ["--flow", "torch:fp32"],
        ["--budget", "torch:fp32 decode<=1s"],
        ["--shape", "3x1", "--flow", "torch:fp32", "--dataset", "text.txt"],
        ["--shape", "3x1", "--flow", "torch:fp32", "--budget", "torch:fp32 decode<=1s", "--dataset", "text.txt"],
    ],
)
def test_either_a_shape_or_a_budget_is_named(place: Path, tmp_path: Path, options: list[str]):
    code, told = deploy(place, *options, "-o", str(tmp_path / "out"))
    assert (code, "name what shall be deployed" in told) == (2, True)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused_before_anything_is_measured(place: Path, tmp_path: Path):
    text = ["--dataset", str(place / "text.txt"), "--profile", str(tmp_path / "profile.json")]
    assert deploy(place, "--budget", "torch:fp32 decode<=1", *text, "-o", str(tmp_path / "out"))[0] == 2
    (tmp_path / "mine").write_text("")
    code, told = deploy(place, "--budget", "torch:fp32 decode<=1s", *text, "-o", str(tmp_path))
    assert (code, "is not empty" in told) == (2, True)
    assert not (tmp_path / "profile.json").exists()
