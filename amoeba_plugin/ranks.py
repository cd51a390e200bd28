"""Sums over the ranks of torch.distributed; without it, everything here is what one process has."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors, the same on every rank.

    Args:
        values: On the CPU, of the same shape and dtype on every rank; left as it is.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return values
    # nccl moves what is on an accelerator only, gloo what is on the CPU
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else values.device
    total = values.to(device, copy=True)
    distributed.all_reduce(total)
    return total.to(values.device)
