"""The flow onnxruntime keeps what every flow must, by ONNX Runtime itself, alone where a user has nothing else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest
import tokenizers
from amoeba_onnxruntime.flow import NEEDED, PYTHON, OnnxRuntime

from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.engines.process import EngineCommand, EngineProcess
from amoeba_plugin.deployment.flow import Export, Point
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.registry import flow_named
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.shape import ShapeSpace
from amoeba_plugin.testing.flows import CONFIG, FlowConformance, promised, tokenizer
from amoeba_plugin.testing.random_models import random_model, random_strategy

HEAVY = """
import sys
sys.path.insert(0, {directory!r})
import engine
class Engine(engine.Engine):
    def heavy(self):
        return [name for name in ("torch", "transformers", "amoeba_plugin") if name in sys.modules]
"""
ALONE = """
import sys
sys.path.append({packages!r})
try:
    import torch
except ImportError:
    exec({program!r})
"""
Alone = Callable[[str, Path], str]


@pytest.fixture
def alone(tmp_path: Path) -> Alone:
    """Return what a program prints in a directory, where nothing but what its page names can be imported."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for module in (np, onnxruntime, onnxruntime_genai, tokenizers):
        home = Path(module.__file__).parent
        for each in (home, home.with_name(f"{home.name}.libs")):
            if each.exists():
                (packages / each.name).symlink_to(each)

    def run(program: str, directory: Path) -> str:
        code = ALONE.format(packages=str(packages), program=program)
        ran = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], cwd=directory, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


class TestOnnxRuntime(FlowConformance):
    flow = OnnxRuntime()
    holds = promised(Path(__file__).parents[3] / "README.md", flow.name)


def test_a_quantized_shape_is_deployed_and_runs_without_anything_of_ours(tmp_path: Path, alone: Alone):
    model = random_model(CONFIG)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    elastic = ElasticModel(model, random_strategy(model))
    save_elastic(elastic, None, tmp_path / "elastic", str(tmp_path / "base"))
    deployed = deploy_shape(tmp_path / "elastic", "3x1/2", "onnxruntime:int4", tmp_path / "out")
    assert deployed.parity.whole_mean_kl is not None
    # 4 bits: of each of three layers q, k and v in one, o, gate, up and down; and the output. Not: embeddings, norms
    # and the angles of positions.
    assert deployed.export.tensor_types == {"INT4": 16, "FLOAT": 10}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "parity.json",
    }  # fmt: skip
    answers = [alone(program, tmp_path / "out") for program in programs(tmp_path / "out/README.md")]
    assert len(answers) == 2
    assert all(answer.startswith("The capital of France is") for answer in answers)
    assert answers[0] == answers[1]


def programs(page: Path) -> list[str]:
    return [each.partition("```")[0] for each in page.read_text().split("```python\n")[1:]]


def test_shapes_are_profiled(tmp_path: Path):
    subject = Subject.of(random_model(CONFIG).config, ShapeSpace((4, 2), (Fraction(1), Fraction(1, 2))))
    points = {Point("onnxruntime", scheme): OnnxRuntime() for scheme in ("fp32", "int4")}
    how = Measuring(prompts=(8, 32), decoded=4, rounds=1, shapes=4)
    profile = profile_model(subject, points, tmp_path / "p.json", how, "tiny", progress=False)
    for flow in profile.flows.values():
        assert set(flow.shapes) == {"4x1", "4x1/2", "2x1", "2x1/2"}
        assert flow.shapes["4x1"].bytes > flow.shapes["2x1/2"].bytes
        assert all(cost.rounds[0].decode.cpu > 0 for cost in flow.shapes.values())


def test_it_is_found_by_its_entry_point():
    assert isinstance(flow_named("onnxruntime"), OnnxRuntime)


def test_missing_packages_are_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeploymentError, match=f"pip install {' '.join(NEEDED.values())}.*{PYTHON}"):
        OnnxRuntime().command()


def test_another_python_is_taken_where_one_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PYTHON, "/somewhere/python")
    assert OnnxRuntime().command().python == Path("/somewhere/python")


def test_its_engine_needs_neither_torch_nor_this_package(tmp_path: Path):
    command = OnnxRuntime().command()
    (tmp_path / "heavy.py").write_text(HEAVY.format(directory=str(command.file.parent)))
    with EngineProcess("onnxruntime", EngineCommand(tmp_path / "heavy.py", command.python)) as engine:
        assert engine.ask("about").value["engine"] == "ONNX Runtime"
        assert engine.ask("heavy").value == []


def test_a_model_without_a_tokenizer_has_no_program_that_reads_text():
    assert OnnxRuntime().ways_to_run(Export(".", {"model.onnx": 1})) == []


def test_two_prompts_at_a_time_are_refused():
    with (
        EngineProcess("onnxruntime", OnnxRuntime().command()) as engine,
        pytest.raises(DeploymentError, match="one prompt at a time"),
    ):
        engine.ask("load", path="anywhere", threads=1, context=8, batch=2)
