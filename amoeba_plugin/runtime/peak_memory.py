"""The most memory that was in use, of the process and of the accelerator, in bytes."""

from __future__ import annotations

import platform
import resource

import torch


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
