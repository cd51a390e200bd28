"""The parent's side of an engine's process: asks, waits as long as is reasonable, and turns every end into an error."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from amoeba_plugin.errors import DeploymentError

CHILD = Path(__file__).with_name("child.py")
PATIENCE = 300.0  # seconds for one answer
LAST_WORDS = 600  # characters of what an engine printed before it ended
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class EngineCommand:
    """How an engine's process is started.

    Attributes:
        file: Defines ``Engine``; it imports what the engine needs, and nothing of this package.
        python: That has it.
        environment: Variables beside those of this process.
    """

    file: Path
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=dict)


def python_with(needed: Mapping[str, str], engine: str, variable: str) -> Path:
    """Return the Python that an engine's process runs in: one that a variable names, or this one.

    Args:
        needed: Packages by the modules that they bring.
        engine: That needs them.
        variable: Of the environment, for packages that would clash with those here.

    Raises:
        DeploymentError: If none is named, and a module is missing here.
    """
    if os.environ.get(variable):
        return Path(os.environ[variable])
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DeploymentError(
            f"{engine} needs {' and '.join(missing)}: pip install {' '.join(missing)}, or name a Python that has them, "
            f"and torch and transformers, in {variable}"
        )
    return Path(sys.executable)


@dataclass(frozen=True)
class Answer:
    """What came back: the value, and the seconds it took by the clock and of all CPUs."""

    value: Any
    wall: float
    cpu: float


class EngineProcess:
    """One engine's process; a context manager. It starts with the first question.

    Args:
        name: Of the flow, for people.
        command: Starts it.
        threads: What libraries that count cores are told they have.
        patience: Seconds that one answer may take.
    """

    def __init__(self, name: str, command: EngineCommand, threads: int = 1, patience: float = PATIENCE) -> None:
        self.name, self._command, self._threads, self._patience = name, command, threads, patience
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Return what a method of the engine returns.

        Raises:
            DeploymentError: If it raises, does not answer in time, or its process ends; the process is over then.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(do) from None
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            if not waiting.select(self._patience):
                self.close()
                raise DeploymentError(
                    f"{self.name} did not answer within {self._patience:.0f} s ({do}); its process was stopped"
                )
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise self._ended(do)
        answer = json.loads(line)
        if "error" in answer:
            said = self._last_words()
            self.close()
            raise DeploymentError(f"{self.name} failed ({do}): {answer['error']}{said}")
        return Answer(answer["value"], answer["wall"], answer["cpu"])

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
            process.kill()
            process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # see close
        counted = dict.fromkeys(ONE_THREAD, str(self._threads))
        try:
            self._process = subprocess.Popen(
                [str(self._command.python), str(CHILD), str(self._command.file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8",
                env={**os.environ, **counted, **self._command.environment},
            )  # fmt: skip
        except OSError as error:
            self.close()
            raise DeploymentError(
                f"the Python of {self.name}, {self._command.python}, cannot be started ({error}); name another"
            ) from error
        return self._process

    def _ended(self, do: str) -> DeploymentError:
        assert self._process is not None
        code, said = self._process.wait(), self._last_words()
        self.close()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return DeploymentError(f"the process of {self.name} ended {how} ({do}){said}")

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        said = " ".join(self._errors.read().split())[-LAST_WORDS:]
        return f"; it said last: {said}" if said else ""
