"""What a child process runs: one engine, asked by JSON lines on its standard input, answering by JSON lines.

Python's standard library alone: an engine may run in a Python that has neither torch nor this package. It is started as
a script, with the path of an engine file, which defines a class ``Engine``. Each line names one of its methods and the
arguments; the answer has what the method returned, and the seconds it took by the clock and of all CPUs.
"""

from __future__ import annotations

import base64
import gc
import importlib.util
import json
import os
import resource
import signal
import struct
import sys
import time
from typing import Any

PEAK_RESET, PEAK = "/proc/self/clear_refs", "/proc/self/status"


def serve(engine_file: str) -> None:
    """Answer until the input ends."""
    # What an engine prints must not mix with answers: they have the output to themselves, prints go where errors go.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            if engine is None:
                engine = _engine(engine_file)
            if asked["do"] == "has":
                value: Any = hasattr(engine, asked["with"]["method"])
            else:
                method = {"peak": peak, "reset_peak": reset_peak}.get(asked["do"]) or _method(engine, asked["do"])
                value = method(**asked["with"])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            answer = {"value": value, "wall": wall, "cpu": cpu}
        except Exception as error:  # noqa: BLE001  # whatever an engine raises is an answer, not the end of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def reset_peak() -> None:
    """Begin to look for the peak of memory anew, where the system can."""
    gc.collect()
    try:
        with open(PEAK_RESET, "w") as file:  # noqa: PTH123
            file.write("5")
    except OSError:
        pass


def peak() -> int:
    """Return the most bytes that were resident since then."""
    try:
        with open(PEAK) as file:  # noqa: PTH123
            found = [line.split() for line in file if line.startswith("VmHWM:")]
        return int(found[0][1]) * 1024
    except (OSError, IndexError):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _method(engine: Any, name: str) -> Any:
    if name == "token_log_probabilities" and not hasattr(engine, name):
        return lambda tokens, behind: [
            _picked(row, tokens[count])
            for row, count in zip(engine.log_probabilities(tokens, behind), behind, strict=True)
        ]
    return getattr(engine, name)


def _picked(row: str, token: int) -> float:
    found: float = struct.unpack_from("<f", base64.b64decode(row), 4 * token)[0]
    return found


def _engine(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Engine()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all at a terminal: who asks says when it is over
    serve(sys.argv[1])
