"""The rights of a user who is not root, in a test that root runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VERSION = 0x20080522  # of the calls, linux/capability.h
OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: what lets root pass over permissions


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Let permissions of files hold for this thread, also where it is root's; skip the test where that cannot be."""
    if os.geteuid() != 0:
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "capset"):
        pytest.skip("root passes over permissions, and this system's capabilities are unknown")
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert library.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~OVERRIDES
    assert library.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert library.capset(header, sets) == 0


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Let nobody write in a directory for a block of code, not even root."""
    directory.chmod(0o555)
    try:
        with ordinary_user():
            yield
    finally:
        directory.chmod(0o755)
