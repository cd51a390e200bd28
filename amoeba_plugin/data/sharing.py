"""Calibration batches shared out over the ranks of torch.distributed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.runtime.ranks import gather, rank, world_size


def shard(batches: Sequence[Batch]) -> tuple[list[Batch], str]:
    """Return this rank's batches, and a digest of the data of all ranks together, the same on all of them.

    Ranks that were given the same batches share them out; ranks whose loaders have split the data already keep theirs.
    """
    own = digest(batches)
    every = gather(torch.tensor([list(bytes.fromhex(own))], dtype=torch.uint8))
    if world_size() == 1 or bool((every == every[0]).all()):
        return list(batches[rank() :: world_size()]), own
    return list(batches), hashlib.sha256(bytes(every.flatten().tolist())).hexdigest()


def digest(batches: Sequence[Batch]) -> str:
    """Return the SHA-256 of all columns of all batches."""
    whole = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            values = batch[name].detach().cpu().contiguous()
            whole.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
            whole.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
