"""From a budget to what an engine runs, in one call: the best shape that keeps it, deployed."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.profiling.measure import Measuring
from amoeba_plugin.deployment.search import preflight
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import random_model, random_strategy


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("within")
    model = random_model(CONFIG)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    save_elastic(ElasticModel(model, random_strategy(model)), None, directory / "elastic", str(directory / "base"))
    (directory / "text.txt").write_text("\n".join(shipped_texts().passages))
    return directory


def deploy(place: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["deploy", str(place / "elastic"), *options])
    return result.exit_code, " ".join(result.output.split())


def test_the_best_shape_within_a_budget_is_deployed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "Measuring", functools.partial(Measuring, rounds=1, shapes=9))
    sizes = {}
    for shape in ("4x1", "3x1", "4x1/2"):
        deploy_shape(place / "elastic", shape, "torch:fp32", tmp_path / shape.replace("/", "_"))
        files = [each for each in (tmp_path / shape.replace("/", "_")).iterdir() if each.suffix == ".safetensors"]
        sizes[shape] = sum(each.stat().st_size for each in files)
    most = (sizes["4x1"] + sizes["3x1"]) // 2 + 80_000  # beside the weights there are a tokenizer and a configuration
    profile, out = tmp_path / "profile.json", tmp_path / "out"
    code, told = deploy(
        place, "--budget", f"torch:fp32 file<={most}B", "--dataset", str(place / "text.txt"), "--profile", str(profile),
        "-o", str(out),
    )  # fmt: skip
    assert code == 0, told
    assert profile.is_file()
    weights = sum(each.stat().st_size for each in out.glob("*.safetensors"))
    assert 0 < weights < sizes["4x1"]
    assert f"written to {out}" in told or "written to" in told
    assert (out / "parity.json").is_file()


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
