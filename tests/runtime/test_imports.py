"""Imports without the collector, which works as before afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest

from amoeba_plugin.runtime.imports import lasting_imports


class Ring:
    """Holds itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Let the tests that follow collect what these froze."""
    yield
    gc.unfreeze()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_made_inside_is_left_alone_and_what_is_made_later_is_collected(fails: bool) -> None:
    with suppress(ImportError), lasting_imports():
        assert not gc.isenabled()
        inside = weakref.ref(Ring())
        if fails:
            raise ImportError
    assert gc.isenabled()
    later = weakref.ref(Ring())
    gc.collect()
    assert inside() is not None
    assert later() is None


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with lasting_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
