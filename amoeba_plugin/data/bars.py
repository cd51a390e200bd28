"""Progress bars of the data sets library, where they tell nobody anything: on what is done within a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MANY = 10_000  # rows that are read or saved in about a second
LARGE = 10_000_000  # bytes of a file that is


@contextmanager
def without_bars(small: bool = True) -> Iterator[None]:
    """Let the library show no bars in a block of code; then it is as its user set it, who may have asked for them.

    Args:
        small: Whether what is done is over before a bar is read; else nothing is changed.
    """
    from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars

    asked = getattr(config, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)  # by the environment: it cannot be changed
    if not small or asked is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
