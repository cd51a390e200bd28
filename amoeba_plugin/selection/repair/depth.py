"""What removed layers added to the residual stream, folded into the MLP of the layer in front of them.

The linear fit is ReplaceMe's (arXiv:2505.02819), which merges a map of the MLP's output there into the weight; here
the map is of the MLP's neurons, which are more than the hidden size, and rows count by the length of their state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from amoeba_plugin.selection.kept_steps import NOWHERE, KeptSteps
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.repair.least_squares import factorised
from amoeba_plugin.selection.repair.moments import gram_of
from amoeba_plugin.shape import half_steps

RIDGE = 0.1  # relative to the mean of the weighted moments' diagonal
SHORTEST = 1e-3  # length of a state, from which on it counts as that long

Folds = Mapping[float, Mapping[str, Tensor]]  # by depth and group key: weights (out, in) of the whole width


@dataclass
class Fit:
    """The regressions of what removed layers add on the neurons of the layer in front of them.

    ``minimise sum over tokens |D - A a|^2 / |h|^2 + ridge |A|^2``: D is what they add, a the neurons, h the state.

    Attributes:
        gram: (neurons, neurons) fp64, sum of ``a a^T / |h|^2``; where the tokens are.
        cross: For each run of removed layers (neurons, hidden) fp64, sum of ``a D^T / |h|^2``.
    """

    gram: Tensor
    cross: list[Tensor]

    @classmethod
    def empty(cls, neurons: int, hidden: int, runs: int = 1) -> Fit:
        """Return the fit of no tokens, for so many runs of layers behind one."""
        zeros = partial(torch.zeros, dtype=torch.float64)
        return cls(zeros(neurons, neurons), [zeros(neurons, hidden) for _ in range(runs)])

    def add(self, neurons: Tensor, states: Tensor, added: Sequence[Tensor]) -> None:
        """Count tokens: (tokens, neurons), (tokens, hidden), and of each run (tokens, hidden), any float dtype."""
        weights = 1 / states.float().norm(dim=-1, keepdim=True).clamp_min(SHORTEST)
        rows = neurons.float() * weights
        where = rows.device if rows.device.type != "mps" else torch.device("cpu")  # which has no fp64
        self.gram = self.gram.to(where) + gram_of(rows).to(where, torch.float64)
        self.cross = [
            cross.to(where) + (rows.mT @ (each.float() * weights)).to(where, torch.float64)
            for cross, each in zip(self.cross, added, strict=True)
        ]

    def solved(self) -> list[Tensor]:
        """Return A of every run, (hidden, neurons) fp64, from the tokens of all ranks; zeros where there are none."""
        gram, *cross = (sum_over_ranks(each.cpu()).to(each.device) for each in (self.gram, *self.cross))
        scale = gram.diagonal().mean()
        if not scale > 0:
            return [each.mT * 0 for each in cross]
        factor = factorised(gram, scale * RIDGE)
        return [torch.cholesky_solve(each, factor).mT for each in cross]


def removed_runs(kept: tuple[int, ...], layers: int) -> dict[int, range]:
    """Return the runs of removed layers by the layer in front of them; a run that nothing is in front of is left out.

    >>> removed_runs((1, 2, 5), 7)
    {2: range(3, 5), 5: range(6, 7)}
    """
    gone = [index for index in range(layers) if index not in kept]
    runs = [[index for _, index in run] for _, run in groupby(enumerate(gone), lambda each: each[1] - each[0])]
    return {run[0] - 1: range(run[0], run[-1] + 1) for run in runs if run[0] > 0}


def fold_depths(runs: LayerRuns, depth: DepthStrategy, progress: bool = True, kept: KeptSteps = NOWHERE) -> Folds:
    """Return, for every depth, the weights of the MLPs that stand in front of removed layers.

    From below upwards, each with the network below already repaired. Depths that lose sublayers, and models whose MLP
    is not added to the residual stream as its linear leaves it, have none.

    Args:
        runs: Of the whole model, channels in their own order; it is left as it was.
        depth: Which layers every depth keeps.
        progress: Show a progress bar.
        kept: Holds depths that are done.
    """
    group, layers = foldable(runs), len(runs.adapter.layers(runs.model))
    shorter = [each for each in depth.kept if each != layers and each not in depth.lost]
    if group is None or not shorter:
        return {}
    share = runs.adapter.residual_share(runs.model.config)
    assert share is not None
    bar = StageBar(
        total=layers * len(shorter), desc="depth repair", unit="layer", disable=not progress or rank() != 0,
        shorter=f"{LESS_DATA}, or repair: none",
    )  # fmt: skip
    folds: dict[float, Mapping[str, Tensor]] = {}
    with bar:
        for number, each in enumerate(shorter, 1):
            fold = partial(_folded, runs, group, depth.kept[each], share, bar.update)
            folds[each] = kept.tensors(f"folds_{half_steps(each)}", fold)
            bar.update(layers * number - bar.n)
    return folds


def foldable(runs: LayerRuns) -> ChannelGroup | None:
    """Return the neurons whose MLP takes what removed layers add; ``None`` where none can."""
    groups = [group for group in runs.adapter.channel_groups(runs.model.config) if group.name == "mlp"]
    layers = runs.adapter.layers(runs.model)
    packed = any(is_packed(layer.get_submodule(group.consumer.path)) for layer in layers for group in groups)
    return None if packed or runs.adapter.residual_share(runs.model.config) is None else groups[0]


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
                run_watched(lockstep, group, index)
                for removed in gone[index]:
                    lockstep.run_layer(removed)
                change = fitted(lockstep, group, index, [after])[0] / share
                with _changed(group.consumer.weight(lockstep.layers[index]), change) as weight:
                    folds[group_key(index, group)] = weight.to("cpu", copy=True).contiguous()
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


def run_watched(lockstep: Lockstep, group: ChannelGroup, layer: int) -> None:
    """Run all batches through a layer, and keep its neurons, (tokens, neurons), until they are counted."""
    running, (_, into) = [0], group.consumer.size(lockstep.layers[layer])

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        lockstep.flying["neurons", running[0]] = args[0].reshape(-1, into)  # OPT's are of one axis already

    handle = lockstep.layers[layer].get_submodule(group.consumer.path).register_forward_pre_hook(keep)
    try:
        lockstep.run_layer(layer, partial(running.__setitem__, 0))
    finally:
        handle.remove()


def fitted(lockstep: Lockstep, group: ChannelGroup, front: int, ends: Sequence[int]) -> list[Tensor]:
    """Return what to add to the MLP of a layer in place of those up to several ends, (hidden, neurons) fp64 for each.

    The neurons are those that :func:`run_watched` kept, which are forgotten; the states before all ends are known.
    """
    out, into = group.consumer.size(lockstep.layers[front])
    fit = Fit.empty(into, out, len(ends))
    for batch, given in enumerate(lockstep.batches):
        states, *behind = (lockstep.cached[step, batch].flatten(0, -2) for step in (front + 1, *ends))
        present = given["attention_mask"].bool().flatten().to(states.device)
        neurons = lockstep.flying["neurons", batch]
        fit.add(neurons[present], states[present], [(each - states)[present] for each in behind])
    lockstep.flying.clear()
    return fit.solved()
