"""Runs of a recipe in processes of their own, killed at a chosen change of a file, or after a chosen time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.run import run_recipe
from support.forked import forked

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.move", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OPTIONS = RunOptions(num_samples=8, max_seq_length=12, batch_size=4)


class Changes:
    """Counts the changes of files below a directory, and kills the process before one of them."""

    def __init__(self, root: Path, last: int | None = None) -> None:
        self.root, self.last, self.seen = str(root), last, 0
        sys.addaudithook(self)  # for the rest of the process

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python tells of every call of the system."""
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if not changes or not str(arguments[0]).startswith(self.root):
            return
        if self.seen == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1


def start(work: Path, base: Path, before: int | None = None, seconds: float | None = None) -> int:
    """Run ``work/recipe.yaml`` into ``work/out`` in a process of its own; return the number of changes of files.

    Args:
        work: Everything that is written is below it.
        base: The model; its tokenizer and ``text.jsonl`` are there too.
        before: The process is killed before so many changes.
        seconds: The process is killed after so many.
    """
    reader, writer = os.pipe()

    def run() -> None:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        changes = Changes(work, before)
        if seconds is not None:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        run_recipe(str(work / "recipe.yaml"), str(base), str(base / "text.jsonl"), work / "out", OPTIONS)
        os.write(writer, str(changes.seen).encode())
        os._exit(0)

    process = forked(run)
    process.start()
    process.join()
    os.close(writer)
    with os.fdopen(reader) as counted:
        seen = counted.read()
    killed = process.exitcode == -signal.SIGKILL and (before is not None or seconds is not None)
    assert killed or process.exitcode == 0, process.exitcode
    return int(seen or 0)
