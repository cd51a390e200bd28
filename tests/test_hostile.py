"""Whatever recipe, shape or elastic checkpoint it is given, the command accepts or refuses: it never falls over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.testing.random_models import attach_random_smol
from support.bases import save_with_text
from support.hostile import SHAPES, damaged, recipes, sound_recipes
from support.models import random_elastic, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # hosts warn of what they are given, and go on
FEW = settings(
    max_examples=100, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=4000, derandomize=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with a tokenizer and a text."""
    return save_with_text(tiny_llama(num_hidden_layers=2), tmp_path_factory.mktemp("hostile") / "base")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Path:
    """An elastic checkpoint with an adapter, of a model of four layers."""
    base = save_with_text(tiny_llama(), tmp_path_factory.mktemp("larger") / "base")
    model = random_elastic(AutoModelForCausalLM.from_pretrained(base))
    save_elastic(model, attach_random_smol(model), work / "elastic", str(base))
    return work / "elastic"


@pytest.fixture(scope="module")
def larger(elastic: Path) -> str:
    """The model of the elastic checkpoint."""
    return str(json.loads((elastic / "elastic.json").read_bytes())["base_model"])


def accepts(*arguments: str | Path) -> bool:
    """Whether a command ends well; it must refuse in words otherwise."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 2), (arguments, result.exception, result.output)
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or "rror" in result.stderr
    return result.exit_code == 0


def below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def check_recipe(text: str, base: Path, work: Path) -> bool:
    path = work / "recipe.yaml"
    path.write_bytes(text.replace("WORK", str(work)).encode(errors="surrogatepass"))
    before = below(work)
    accepted = accepts("check", path, "--model", base)
    assert below(work) == before
    return accepted


@settings(FEW, max_examples=80)
@given(text=recipes())
def test_recipes(text: str, base: Path, work: Path) -> None:
    check_recipe(text, base, work)


@settings(FEW, max_examples=120)
@given(shape=SHAPES)
def test_shapes(shape: str, larger: str, elastic: Path) -> None:
    accepts("loads", "--model", larger, "--flow", "torch", "--strategy", elastic, "--", shape)


@FEW
@given(data=st.data())
def test_elastic_checkpoints(data: st.DataObject, elastic: Path, work: Path) -> None:
    damage_and_extract(data, elastic, work)


def damage_and_extract(data: st.DataObject, elastic: Path, work: Path) -> None:
    files = sorted(path.relative_to(elastic) for path in below(elastic) if path.is_file() and path.name != "README.md")
    name = data.draw(st.sampled_from(files))
    copied = work / "damaged"
    shutil.copytree(elastic, copied)
    try:
        (copied / name).write_bytes(data.draw(damaged((elastic / name).read_bytes())))
        if data.draw(st.booleans()) and name.name != "elastic.json":  # as an older version left it
            document = json.loads((copied / "elastic.json").read_text()) | {"version": 1}
            del document["files"], document["base_files"]
            (copied / "elastic.json").write_text(json.dumps(document))
        before = below(work)
        if accepts("extract", copied, "--shape", "2x1/2", "-o", work / "out"):
            shutil.rmtree(work / "out")
        assert below(work) == before
    finally:
        shutil.rmtree(copied)


executed = dict.fromkeys((0, 2), 0)  # runs that a plan accepted, by exit code


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(MANY, max_examples=1000)
@given(text=sound_recipes())
def test_what_is_accepted_runs(text: str, base: Path, work: Path) -> None:
    if sum(executed.values()) >= 200 or not check_recipe(text, base, work):
        return
    arguments = ["run", str(work / "recipe.yaml"), "--model", str(base), "-o", str(work / "out")]
    data = ["--dataset", str(base / "text.jsonl"), "--num-calibration-samples", "4", "--max-seq-length", "12"]
    before = below(work)
    result = CliRunner().invoke(app, arguments + data)
    assert result.exit_code in (0, 2), (text, result.exception, result.output)
    executed[result.exit_code] += 1
    for path in sorted(below(work) - before, reverse=True):
        assert result.exit_code == 0 or path.name not in ("out", "elastic"), (text, result.output)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_most_of_what_was_accepted_ran() -> None:
    assert sum(executed.values()) >= 200
    assert executed[0] >= 190, executed


@pytest.mark.slow
@pytest.mark.timeout(7200)
@MANY
@given(text=recipes())
def test_many_recipes(text: str, base: Path, work: Path) -> None:
    check_recipe(text, base, work)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@MANY
@given(shape=SHAPES)
def test_many_shapes(shape: str, larger: str, elastic: Path) -> None:
    accepts("loads", "--model", larger, "--flow", "torch", "--strategy", elastic, "--", shape)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(MANY, max_examples=2500)
@given(data=st.data())
def test_many_elastic_checkpoints(data: st.DataObject, elastic: Path, work: Path) -> None:
    damage_and_extract(data, elastic, work)
