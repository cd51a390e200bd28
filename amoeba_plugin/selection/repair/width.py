"""The weights of every width that make up for channels that are gone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.elastic.group import consumer_weight
from amoeba_plugin.elastic.repairs import Place, Repairs
from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.models.adapter import ChannelGroup, group_key
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.in_order import in_order
from amoeba_plugin.selection.kept_steps import NOWHERE, KeptSteps
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.repair.depth import Folds
from amoeba_plugin.selection.repair.drift import Drift, catching_up, drifting, pass_whole
from amoeba_plugin.selection.repair.least_squares import best_ridge, repaired_prefixes
from amoeba_plugin.selection.repair.moments import ChannelMoments, Moments, held_out_rows, watched

RIDGES = (1e-3, 1e-2, 1e-1)  # tried; relative to the mean of the moments' diagonal
FOLDED = "depth"  # the method where nothing but depths is repaired
DEFAULT_RIDGE = 1e-2  # where no row is held out to choose one


@dataclass(frozen=True)
class Repair:
    """A way to repair the linears that read removed channels.

    Attributes:
        name: The name it is registered under.
        columns: Maps a weight (out, in), the moments of its input, columns of both in order of importance, and several
            numbers of columns that stay, the first ones, to a weight (out, kept) fp64 for each number.
        description: One line for people.
        catches_up: Share of what narrow layers have lost so far that each layer's MLP makes up for; 0: none.
    """

    name: str
    columns: Callable[[Tensor, Moments, Sequence[int]], Mapping[int, Tensor]]
    description: str = ""
    catches_up: float = 0.0


@dataclass(frozen=True)
class WidthRepair:
    """A repair that is tried: from moments of the whole model, and with no choice of a ridge.

    Attributes:
        repair: What computes weights.
        moments: Of all groups, channels in the model's order.
        unseen: Leave out the rows that are held out, for trials that are judged on them.
    """

    repair: Repair
    moments: ChannelMoments
    unseen: bool = False

    def columns(
        self, key: str, group: ChannelGroup, weight: Tensor, order: Tensor, units: Sequence[int]
    ) -> dict[int, Tensor]:
        """Return a group's repaired weights in its dtype, on the CPU, by units kept; none for all units.

        Args:
            key: Of the group.
            group: Which channels a unit has.
            weight: The consumer's, (out, in), columns in ``order``.
            order: (units,), most important first.
            units: Numbers of units.
        """
        size = group.consumer.channels_per_unit
        counts = sorted({count * size for count in units if count < group.units})
        if not counts:
            return {}
        within = group.consumer.channels(order) - group.consumer.first_channel
        moments = self.moments[key].joined(not self.unseen).ordered(within)
        found = self.repair.columns(weight, moments, counts)
        return {count // size: each.to("cpu", weight.dtype) for count, each in found.items()}


def by_least_squares(weight: Tensor, moments: Moments, kept: Sequence[int]) -> dict[int, Tensor]:
    """Repair by least squares, with the ridge that is best on held-out rows where the fewest columns stay.

    Args:
        weight: (out, in), columns in order of importance.
        moments: Of its input, in the same order.
        kept: Columns that stay, the first ones; several numbers of them.

    Returns:
        By number (out, kept), fp64.
    """
    held_out = bool(moments.held_out.diagonal().any())
    ridge = best_ridge(weight, moments.seen, moments.held_out, min(kept), RIDGES) if held_out else DEFAULT_RIDGE
    return repaired_prefixes(weight, moments.all, kept, ridge)


def repair_shapes(
    runs: LayerRuns,
    width: WidthStrategy,
    repair: Repair | None,
    folds: Folds = MappingProxyType({}),
    progress: bool = True,
    kept: KeptSteps = NOWHERE,
) -> Repairs:
    """Return the repaired weights of all widths and depths.

    Each width that is narrower than the whole has a run of its own, from the first layer to the last: attention sees
    what the layers before it, narrow and repaired, make of the calibration data, and the MLP what the attention of its
    own layer makes of it, too. What a width has there it has at every depth, but for layers in front of removed ones,
    whose own weights are repaired from the same moments.

    Args:
        runs: Of the whole model, its channels in their own order; it is left as it was.
        width: Order and sizes.
        repair: What computes the weights of widths; ``None``: they are as they are cut.
        folds: Weights of layers in front of removed ones, from ``fold_depths``.
        progress: Show a progress bar.
        kept: Holds widths that are done.
    """
    groups, layers = runs.adapter.channel_groups(runs.model.config), len(runs.adapter.layers(runs.model))
    keyed = {group_key(index, group): group for index in range(layers) for group in groups}
    ordered = {
        depth: {key: each[:, _channels(keyed[key], width.order.get(key))] for key, each in held.items()}
        for depth, held in folds.items()
    }
    weights: dict[Place, Mapping[str, Tensor]] = {(depth, Fraction(1)): held for depth, held in ordered.items()}
    narrow = [share for share in sorted(width.units, reverse=True) if share != 1]
    if repair is None:
        for depth, share in itertools.product(ordered, narrow):
            sizes = {key: width.units[share][key] * keyed[key].consumer.channels_per_unit for key in ordered[depth]}
            weights[depth, share] = {key: ordered[depth][key][:, :size] for key, size in sizes.items()}
    elif narrow:
        weights |= _repaired_widths(runs, width, repair, ordered, progress, kept)
    method = FOLDED if repair is None else repair.name
    return Repairs({place: held for place, held in weights.items() if held}, method)


def _repaired_widths(
    runs: LayerRuns, width: WidthStrategy, repair: Repair, folds: Folds, progress: bool, kept: KeptSteps
) -> dict[Place, Mapping[str, Tensor]]:
    """Return weights by width; and by depth and width those of ``folds``, whose columns are in order."""
    weights: dict[Place, Mapping[str, Tensor]] = {}
    groups, layers = runs.adapter.channel_groups(runs.model.config), len(runs.adapter.layers(runs.model))
    narrow = [share for share in sorted(width.units, reverse=True) if share != 1]
    neurons = catching_up(runs) if repair.catches_up else None
    made_up = repair.catches_up / (runs.adapter.residual_share(runs.model.config) or 1.0)
    silent, held_out = not progress or rank() != 0, held_out_rows(runs.batches)
    shorter = f"{LESS_DATA}, or repair: none"
    bar = StageBar(total=layers * len(narrow), desc="repair", unit="layer", disable=silent, shorter=shorter)
    with bar, in_order(runs.model, runs.adapter, width) as elastic:

        def narrowed(share: Fraction) -> dict[str, Tensor]:
            found: dict[Place, dict[str, Tensor]] = {(None, share): {}}
            held = found[None, share]
            with runs.open() as lockstep:
                for index, layer in enumerate(lockstep.layers):
                    here = {group_key(index, group): group for group in groups}
                    units = {key: group.units for key, group in here.items()}
                    if neurons is not None:
                        pass_whole(lockstep, index)
                    for part in _parts(here, width.units[share], folds):
                        moments, drift = _seen(lockstep, index, part, held_out, neurons, made_up)
                        for key, group in part.items():
                            units[key], seen = width.units[share][key], moments[key].over_ranks()
                            columns, lost = units[key] * group.consumer.channels_per_unit, drift.get(key)
                            if units[key] < group.units:
                                held[key] = _repaired(consumer_weight(layer, group), seen, columns, repair, lost)
                            for depth in (depth for depth, fold in folds.items() if key in fold):
                                own = found.setdefault((depth, share), {})
                                own[key] = _repaired(folds[depth][key], seen, columns, repair, lost)
                        elastic.set_layer_units(index, units, held)
                    lockstep.run_layer(index)
                    lockstep.forget([index])
                    bar.update()
            elastic.set_shape(elastic.space.largest)
            return Repairs(found).tensors()

        for number, share in enumerate(narrow, 1):
            held = kept.tensors(f"width_{share.numerator}-{share.denominator}", partial(narrowed, share))
            weights |= Repairs.stored(held, repair.name).weights
            bar.update(layers * number - bar.n)
    return weights


def _parts(
    here: Mapping[str, ChannelGroup], units: Mapping[str, int], folds: Folds
) -> Iterator[Mapping[str, ChannelGroup]]:
    """Yield attention and MLP of a layer, in the order in which they are made narrow, as far as a weight changes."""
    for _, part in itertools.groupby(here.items(), lambda each: each[1].name):
        changed = {
            key: group for key, group in part if units[key] < group.units or any(key in fold for fold in folds.values())
        }
        if changed:
            yield changed


def _seen(
    lockstep: Lockstep, index: int, part: Mapping[str, ChannelGroup], held_out: Sequence[Tensor],
    neurons: ChannelGroup | None, share: float,
) -> tuple[Mapping[str, Moments], Mapping[str, Drift]]:  # fmt: skip
    """Run a layer of which a part is whole; return the moments of its groups, and the drift to make up for, by key.

    Args:
        lockstep: Runs it.
        index: Its number.
        part: Groups of it, by key.
        held_out: Rows of every batch.
        neurons: Of its MLP; ``None``: nothing is made up for.
        share: Of what was lost that is.
    """
    if neurons is None or group_key(index, neurons) not in part:
        with watched(lockstep.layers[index], part, lockstep.batches, held_out, stats=False) as (moments, begin):
            lockstep.run_layer(index, begin)
        return moments, {}
    with (
        watched(lockstep.layers[index], part, lockstep.batches, held_out, stats=False) as (moments, begin),
        drifting(lockstep, neurons, index, share) as (begin_too, drift),
    ):
        lockstep.run_layer(index, lambda batch: (begin(batch), begin_too(batch)))
    return moments, {group_key(index, neurons): drift()}


def _repaired(weight: Tensor, moments: Moments, kept: int, repair: Repair, drift: Drift | None) -> Tensor:
    whole = kept == weight.shape[1]
    found = weight if whole else repair.columns(weight, moments, [kept])[kept]
    if drift is not None and not whole:
        found = found + drift.made_up(moments.all, kept).to(found.device)
    return found.to("cpu", weight.dtype, copy=True).contiguous()


def _channels(group: ChannelGroup, order: Tensor | None) -> Tensor:
    return group.consumer.channels(torch.arange(group.units) if order is None else order)
