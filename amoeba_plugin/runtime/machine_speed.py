"""How fast this machine multiplies matrices: what estimates of time go by."""

from __future__ import annotations

import time
from functools import cache

import torch

SIDE, SECONDS = 1024, 0.2


@cache
def flops_per_second(dtype: torch.dtype = torch.float32) -> float:
    """Return the floating-point operations per second of large matrix products, measured once, on the accelerator
    where there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    matrix = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    matrix @ matrix  # the first one loads what it needs
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        (matrix @ matrix)[0, 0].item()  # waits for it
        done += 1
    return done * 2 * SIDE**3 / (time.perf_counter() - begun)
