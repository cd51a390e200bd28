"""What narrow layers have lost so far, made up for in part by the MLP of each layer.

A repair of each linear by itself predicts what its own removed channels said, from states that narrow layers below have
changed already, and that change adds up. So the MLP also predicts what the whole model's state behind the layer has and
the narrow one's has not, from the neurons that stay. To aim at the whole model's outputs is GPTAQ's idea for
quantization (arXiv:2504.02692). Half of it is made up for by default: all of it fits the calibration data closer still,
which on a small model is no worse on other text (selection/README.md has both). Attention makes up for nothing: it
did harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from amoeba_plugin.models.adapter import ChannelGroup
from amoeba_plugin.runtime.dtypes import products_of
from amoeba_plugin.runtime.module_calls import onloaded
from amoeba_plugin.runtime.ranks import sum_over_ranks
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.repair.least_squares import factorised

RIDGE = 1e-2  # relative to the mean of the moments' diagonal
WHOLE = -1  # number that the whole model's states are known by


@dataclass(frozen=True)
class Drift:
    """Of one layer and width.

    Attributes:
        cross: (hidden, neurons) fp64, sum over the tokens of all ranks of ``d x^T``: d is the share that is made
            up for of the whole model's state behind the layer less the narrow one's, divided by what the output is
            multiplied by; x the neurons in the model's order now.
    """

    cross: Tensor

    def made_up(self, gram: Tensor, kept: int) -> Tensor:
        """Return what to add to the columns of a weight that stay, (hidden, kept) fp64.

        ``E[d x_K^T] (E[x_K x_K^T] + ridge)^-1``: the least-squares prediction of d by x_K.

        Args:
            gram: (neurons, neurons) fp64, sum over the same tokens of ``x x^T``.
            kept: Neurons that stay, the first ones.
        """
        inside = gram[:kept, :kept]
        scale = inside.diagonal().mean()
        if not scale > 0:
            return torch.zeros_like(self.cross[:, :kept])
        factor = factorised(inside, scale * RIDGE)
        return torch.cholesky_solve(self.cross[:, :kept].mT.to(factor), factor).mT


def catching_up(runs: LayerRuns) -> ChannelGroup | None:
    """Return the neurons whose MLP can make up for what was lost; ``None`` where its linear's output is not what is
    added to the residual stream."""
    groups = [group for group in runs.adapter.channel_groups(runs.model.config) if group.name == "mlp"]
    return None if runs.adapter.residual_share(runs.model.config) is None else groups[0]


def pass_whole(lockstep: Lockstep, layer: int) -> None:
    """Run the whole model's states through a layer that is whole now."""
    with onloaded(lockstep.layers[layer].modules()):
        for batch in range(len(lockstep.batches)):
            lockstep.pass_on(WHOLE, layer, batch)


@contextmanager
def drifting(
    lockstep: Lockstep, group: ChannelGroup, layer: int, share: float
) -> Iterator[tuple[Callable[[int], None], Callable[[], Drift]]]:
    """Watch, in a block, the neurons of a layer while the narrow model's states run through it, its MLP whole.

    Args:
        lockstep: Where the whole model's states behind the layer are known, from :func:`pass_whole`.
        group: The neurons.
        layer: Its number.
        share: Of what was lost that is made up for, divided by what the output is multiplied by.

    Yields:
        What has to be told the number of every batch before it runs, and what gives the drift once all have.
    """
    running, (out, into) = [0], group.consumer.size(lockstep.layers[layer])

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        lockstep.flying["neurons", running[0]] = args[0].reshape(-1, into)  # OPT's are of one axis already

    def drift() -> Drift:
        cross = torch.zeros(out, into, dtype=torch.float64)
        for batch, given in enumerate(lockstep.batches):
            whole, narrow = lockstep.flying[WHOLE, batch].float(), lockstep.cached[layer + 1, batch].float()
            present = given["attention_mask"].bool().flatten().to(narrow.device)
            neurons = lockstep.flying["neurons", batch][present]
            lost = (whole - narrow).flatten(0, -2)[present].to(neurons.dtype).float()
            with products_of(neurons.dtype):
                cross += (lost.mT @ neurons.float()).to("cpu", torch.float64)
            lockstep.flying.discard(("neurons", batch))
        return Drift(share * sum_over_ranks(cross))

    handle = lockstep.layers[layer].get_submodule(group.consumer.path).register_forward_pre_hook(keep)
    try:
        yield partial(running.__setitem__, 0), drift
    finally:
        handle.remove()
