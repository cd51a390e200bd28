"""The most memory that was in use, of the process and of the accelerator, in bytes."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
from pathlib import Path

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Forget the accelerator's peak; the process's cannot be forgotten."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Return bytes: of the ``process`` since it began, and of the ``accelerator`` since it was last reset."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = {"process": resident if platform.system() == "Darwin" else resident * 1024}  # macOS counts bytes, Linux KiB
    if torch.accelerator.is_available():
        peak["accelerator"] = torch.accelerator.max_memory_allocated()
    return peak


def resident_memory() -> int:
    """Return the bytes of the process that are in memory now; where the system does not say (not Linux), its peak."""
    return _status("VmRSS")


def restart_resident_peak() -> bool:
    """Forget the most memory that the process has used so far; tell whether the system allows it (Linux does)."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def resident_peak() -> int:
    """Return the most bytes of the process that were in memory, since :func:`restart_resident_peak` where that is
    allowed."""
    return _status("VmHWM")


def give_back_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc), so that it counts no longer."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return peak_memory()["process"]
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
