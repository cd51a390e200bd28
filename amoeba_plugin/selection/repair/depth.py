"""What removed layers added to the residual stream, folded into the MLP of the layer in front of them.

The linear fit is ReplaceMe's (arXiv:2505.02819), which merges a map of the MLP's output there into the weight; here
the map is of the MLP's neurons, which are more than the hidden size, and rows count by the length of their state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.models.adapter import ChannelGroup, group_key
from amoeba_plugin.models.packed_linear import is_packed
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import rank, sum_over_ranks
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.repair.least_squares import factorised

RIDGE = 0.1  # relative to the mean of the weighted moments' diagonal
SHORTEST = 1e-3  # length of a state, from which on it counts as that long

Folds = Mapping[float, Mapping[str, Tensor]]  # by depth and group key: weights (out, in) of the whole width


@dataclass
class Fit:
    """The regression of what removed layers add on the neurons of the layer in front of them.

    ``minimise sum over tokens |D - A a|^2 / |h|^2 + ridge |A|^2``: D is what they add, a the neurons, h the state.

    Attributes:
        gram: (neurons, neurons) fp64, sum of ``a a^T / |h|^2``; where the tokens are.
        cross: (neurons, hidden) fp64, sum of ``a D^T / |h|^2``.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def empty(cls, neurons: int, hidden: int) -> Fit:
        """Return the fit of no tokens."""
        return cls(
            torch.zeros(neurons, neurons, dtype=torch.float64), torch.zeros(neurons, hidden, dtype=torch.float64)
        )

    def add(self, neurons: Tensor, states: Tensor, added: Tensor) -> None:
        """Count tokens: (tokens, neurons), (tokens, hidden), (tokens, hidden), any float dtype."""
        weights = 1 / states.float().norm(dim=-1, keepdim=True).clamp_min(SHORTEST)
        rows = neurons.float() * weights
        where = rows.device if rows.device.type != "mps" else torch.device("cpu")  # which has no fp64
        self.gram, self.cross = self.gram.to(where), self.cross.to(where)
        self.gram += (rows.mT @ rows).to(where, torch.float64)
        self.cross += (rows.mT @ (added.float() * weights)).to(where, torch.float64)

    def solved(self) -> Tensor:
        """Return A, (hidden, neurons) fp64, from the tokens of all ranks; zeros where there are none."""
        gram, cross = (sum_over_ranks(each.cpu()).to(each.device) for each in (self.gram, self.cross))
        scale = gram.diagonal().mean()
        return torch.cholesky_solve(cross, factorised(gram, scale * RIDGE)).mT if scale > 0 else cross.mT * 0


def removed_runs(kept: tuple[int, ...], layers: int) -> dict[int, range]:
    """Return the runs of removed layers by the layer in front of them; a run that nothing is in front of is left out.

    >>> removed_runs((1, 2, 5), 7)
    {2: range(3, 5), 5: range(6, 7)}
    """
    gone = [index for index in range(layers) if index not in kept]
    runs = [[index for _, index in run] for _, run in groupby(enumerate(gone), lambda each: each[1] - each[0])]
    return {run[0] - 1: range(run[0], run[-1] + 1) for run in runs if run[0] > 0}


def fold_depths(runs: LayerRuns, depth: DepthStrategy, progress: bool = True) -> Folds:
    """Return, for every depth, the weights of the MLPs that stand in front of removed layers.

    From below upwards, each with the network below already repaired. Depths that lose sublayers, and models whose MLP
    is not added to the residual stream as its linear leaves it, have none.

    Args:
        runs: Of the whole model, channels in their own order; it is left as it was.
        depth: Which layers every depth keeps.
        progress: Show a progress bar.
    """
    groups = [group for group in runs.adapter.channel_groups(runs.model.config) if group.name == "mlp"]
    share, layers = runs.adapter.residual_share(runs.model.config), runs.adapter.layers(runs.model)
    shorter = [each for each in depth.kept if each != len(layers) and each not in depth.lost]
    packed = any(is_packed(layer.get_submodule(group.consumer.path)) for layer in layers for group in groups)
    if share is None or packed or not shorter:
        return {}
    bar = StageBar(
        total=len(layers) * len(shorter), desc="depth repair", unit="layer", disable=not progress or rank() != 0,
        shorter=f"{LESS_DATA}, or repair: none",
    )  # fmt: skip
    with bar:
        return {each: _folded(runs, groups[0], depth.kept[each], share, bar.update) for each in shorter}


def _folded(
    runs: LayerRuns, group: ChannelGroup, kept: tuple[int, ...], share: float, progress: Callable[[int], object]
) -> dict[str, Tensor]:
    folds: dict[str, Tensor] = {}
    with runs.open() as lockstep:
        gone, index = removed_runs(kept, len(lockstep.layers)), 0
        while index <= kept[-1]:
            after = gone[index].stop if index in gone else index + 1
            if index not in kept:  # nothing is in front of it
                lockstep.skip(index, after)
            elif index not in gone:
                lockstep.run_layer(index)
            else:
                change = _fit(lockstep, group, index, gone[index]).solved() / share
                with _changed(group.consumer.weight(lockstep.layers[index]), change) as weight:
                    folds[group_key(index, group)] = weight.to("cpu", copy=True)
                    lockstep.run_layer(index)
                lockstep.skip(index + 1, after)
            lockstep.forget(range(index, after))
            progress(after - index)
            index = after
    return folds


@contextmanager
def _changed(parameter: Tensor, change: Tensor) -> Iterator[Tensor]:
    """Have something added to a parameter for a block of code; afterwards it is what it was, to the last bit."""
    weight = parameter.detach()
    before = weight.clone()
    try:
        weight.copy_(weight.double() + change.to(weight.device))
        yield weight
    finally:
        weight.copy_(before)


def _fit(lockstep: Lockstep, group: ChannelGroup, front: int, gone: range) -> Fit:
    """Run a layer and those removed behind it, and regress what they add on its neurons."""
    layer, running = lockstep.layers[front], [0]
    out, into = group.consumer.size(layer)

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        lockstep.flying["neurons", running[0]] = args[0].reshape(-1, into)  # OPT's are of one axis already

    handle = layer.get_submodule(group.consumer.path).register_forward_pre_hook(keep)
    try:
        lockstep.run_layer(front, partial(running.__setitem__, 0))
    finally:
        handle.remove()
    for index in gone:
        lockstep.run_layer(index)
    fit = Fit.empty(into, out)
    for batch, given in enumerate(lockstep.batches):
        states, behind = (lockstep.cached[step, batch].flatten(0, -2) for step in (front + 1, gone.stop))
        present = given["attention_mask"].bool().flatten().to(states.device)
        fit.add(lockstep.flying["neurons", batch][present], states[present], (behind - states)[present])
    lockstep.flying.clear()
    return fit
