"""Engines in processes of their own: whatever becomes of one is an answer, or an error of that engine alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from amoeba_plugin.deployment.engines.process import EngineCommand, EngineProcess, python_with
from amoeba_plugin.errors import DeploymentError

ENGINE = """
import os, signal, sys, time
class Engine:
    def __init__(self):
        print("built")                       # on the output that answers go to
        self.kept = []
    def keep(self, value):
        self.kept.append(value)
        os.write(1, b"noise without end of line")
        return self.kept
    def modules(self):
        return [name for name in ("torch", "numpy", "amoeba_plugin") if name in sys.modules]
    def threads(self):
        return os.environ["OMP_NUM_THREADS"]
    def work(self, seconds):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
    def sleep(self, seconds):
        time.sleep(seconds)
    def fail(self):
        print("about to fail", file=sys.stderr)
        raise ValueError("no such thing")
    def die(self, number):
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), number)
    def leave(self):
        os._exit(3)
    def fill(self, megabytes):
        self.memory = bytearray(b"x" * (megabytes << 20))
        self.memory = None
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    file = tmp_path / "engine.py"
    file.write_text(ENGINE)
    with EngineProcess("toy", EngineCommand(file), threads=3, patience=20) as process:
        yield process


def test_answers_carry_values_and_times_whatever_the_engine_prints(engine: EngineProcess):
    assert engine.ask("keep", value=1).value == [1]
    assert engine.ask("keep", value="ä").value == [1, "ä"]
    worked, slept = engine.ask("work", seconds=0.2), engine.ask("sleep", seconds=0.2)
    assert worked.cpu >= 0.2
    assert slept.wall >= 0.2 > 0.1 > slept.cpu
    assert engine.ask("modules").value == []
    assert engine.ask("threads").value == "3"


def test_the_peak_of_memory_is_since_the_last_reset(engine: EngineProcess):
    before = engine.ask("peak").value
    engine.ask("fill", megabytes=64)
    assert engine.ask("peak").value > before + 60 * 2**20
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        engine.ask("reset_peak")
        assert engine.ask("peak").value < before + 30 * 2**20


def test_what_an_engine_raises_is_told_with_its_last_words_and_the_next_question_starts_anew(engine: EngineProcess):
    engine.ask("keep", value=1)
    with pytest.raises(DeploymentError, match=r"toy failed \(fail\): ValueError: no such thing; .*about to fail"):
        engine.ask("fail")
    assert engine.ask("keep", value=2).value == [2]
    with pytest.raises(DeploymentError, match="AttributeError"):
        engine.ask("what_is_not_there")


@pytest.mark.parametrize("name", ["SIGABRT", "SIGSEGV", "SIGKILL"])
def test_a_signal_is_named(engine: EngineProcess, name: str):
    import signal

    with pytest.raises(DeploymentError, match=rf"the process of toy ended by {name} \(die\); .*last words"):
        engine.ask("die", number=int(getattr(signal, name)))
    assert engine.ask("keep", value=1).value == [1]


def test_an_exit_a_hang_and_a_python_that_is_none(engine: EngineProcess, tmp_path: Path):
    with pytest.raises(DeploymentError, match=r"ended with exit code 3 \(leave\)"):
        engine.ask("leave")
    started = time.perf_counter()
    with (
        EngineProcess("slow", EngineCommand(tmp_path / "engine.py"), patience=1.5) as slow,
        pytest.raises(DeploymentError, match=r"slow did not answer within 2 s \(sleep\)"),
    ):
        slow.ask("sleep", seconds=60)
    assert time.perf_counter() - started < 20
    nowhere = EngineCommand(tmp_path / "engine.py", tmp_path / "python")
    with EngineProcess("lost", nowhere) as lost, pytest.raises(DeploymentError, match="the Python of lost"):
        lost.ask("keep", value=1)


def test_an_engine_whose_package_is_missing_says_so(tmp_path: Path):
    file = tmp_path / "engine.py"
    file.write_text("import package_that_nobody_has\n")
    with (
        EngineProcess("toy", EngineCommand(file)) as engine,
        pytest.raises(DeploymentError, match="No module named 'package_that_nobody_has'"),
    ):
        engine.ask("about")


def test_the_python_of_an_engine_is_this_one_or_one_that_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AN_ENGINES_PYTHON", raising=False)
    assert python_with({"json": "json"}, "toy", "AN_ENGINES_PYTHON") == Path(sys.executable)
    with pytest.raises(DeploymentError, match=r"toy needs a-package: pip install a-package, .* in AN_ENGINES_PYTHON"):
        python_with({"json": "json", "no_such_module": "a-package"}, "toy", "AN_ENGINES_PYTHON")
    monkeypatch.setenv("AN_ENGINES_PYTHON", "/somewhere/python")
    assert python_with({"no_such_module": "a-package"}, "toy", "AN_ENGINES_PYTHON") == Path("/somewhere/python")
