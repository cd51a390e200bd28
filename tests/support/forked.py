"""Processes that go on from where a test is: a new interpreter would import torch for seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm.std import tqdm


def forked(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Return a process, not started, that calls a function."""
    return multiprocessing.get_context("fork").Process(target=_with_locks_of_its_own, args=(target, *args))


def _with_locks_of_its_own(target: Callable[..., None], *args: Any) -> None:
    # tqdm's monitor thread may have held a lock at the fork; no thread of the child would ever give it back
    for bar in _bars(tqdm):
        bar.set_lock(threading.RLock())
    target(*args)


def _bars(kind: type[Any]) -> Iterator[type[Any]]:
    """Yield a class of bars and those made from it: one that was first to be used has a lock of its own."""
    yield kind
    for each in kind.__subclasses__():
        yield from _bars(each)


def finish(process: BaseProcess) -> None:
    """Start a process and wait until it has ended well."""
    process.start()
    process.join()
    assert process.exitcode == 0


def killed(target: Callable[..., Any], *args: Any) -> None:
    """Call a function in a process that dies after it, with no time to clear anything up."""

    def call_and_die() -> None:
        kept = target(*args)  # what it returns is not collected before the end
        os.kill(os.getpid(), signal.SIGKILL)
        del kept

    process = forked(call_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
