"""Importing torch and transformers without looking for garbage among what they make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import in this block what stays for as long as the process; for commands, not for a library's callers.

    Some million objects are made of which none is garbage. Python's collector would go through them again and again
    (a fifth of the imports' time), and later once more in the middle of the work.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
