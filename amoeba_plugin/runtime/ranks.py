"""What the ranks of torch.distributed have together; without it, everything here is what one process has."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Return the number of ranks; 1 where torch.distributed is not initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return which rank this process is; the first one, 0, writes files and shows progress."""
    return distributed.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors, the same on every rank.

    Args:
        values: On the CPU, of the same shape and dtype on every rank; left as it is.
    """
    if world_size() == 1:
        return values
    total = values.to(_device(), copy=True)
    distributed.all_reduce(total)
    return total.to(values.device)


def gather(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of ranks.

    Args:
        rows: (rows, ·), on the CPU; how many there are may differ, and be none, what follows may not.
    """
    if world_size() == 1:
        return rows
    counts = [int(count) for count in _gather_equal(torch.tensor([len(rows)]))]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    return torch.cat([each[:count] for each, count in zip(_gather_equal(padded), counts, strict=True)])


def from_first_rank(data: bytes | None) -> bytes | None:
    """Return the bytes that the first rank has; None where it has none."""
    if world_size() == 1:
        return data
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data and rank() == 0 else torch.empty(0).byte()
    size = torch.tensor([len(mine)], device=_device())
    distributed.broadcast(size, src=0)
    if not size.item():
        return None
    content = mine.to(_device()) if rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=_device())
    distributed.broadcast(content, src=0)
    return content.cpu().numpy().tobytes()


def agreed(mine: bool) -> bool:
    """Tell whether something holds on all ranks; all of them have to ask."""
    return bool(gather(torch.tensor([mine])).all())


def _device() -> torch.device:
    # nccl moves what is on an accelerator only, gloo what is on the CPU
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _gather_equal(values: Tensor) -> list[Tensor]:
    values = values.to(_device())
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(gathered, values)
    return [each.cpu() for each in gathered]
