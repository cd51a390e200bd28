"""Parameters that FSDP2 shards over processes: the exchange of their gradients, and reading them between forwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def exchange_gradients(parts: Iterable[nn.Module], exchanges: bool) -> None:
    """Let the next backward exchange the gradients of modules, or let it only add them up.

    A backward that exchanges does so for all modules at its end: also for those that took no part, with what earlier
    backwards left there. FSDP knows them from the first forward, which has to be one of the whole model.

    Args:
        parts: Everything sharded is in one of them. The model alone does not do: it has the active layers only.
        exchanges: In the next backward.
    """
    modules = {module for part in parts for module in part.modules() if isinstance(module, FSDPModule)}
    for module in modules:
        module.set_requires_gradient_sync(exchanges, recurse=False)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let a block read the parameters of one sharded module, without those that sharded modules inside of it hold.

    Of a whole model these are, for example, a SMOL router's. All processes have to come here. A module that is not
    sharded is left alone.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole_state_dict(model: nn.Module) -> dict[str, Any] | None:
    """Return all that a sharded model holds, on the first process' CPU; empty on the others. None: it is not sharded.

    All processes have to come here.
    """
    if not isinstance(model, FSDPModule):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def all_finite(gradients: Iterable[Tensor]) -> bool:
    """Tell whether gradients are finite, the same on every process; sharded ones are looked at as a whole."""
    norm = nn.utils.get_total_norm(list(gradients))
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return bool(torch.isfinite(whole))
