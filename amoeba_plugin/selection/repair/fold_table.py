"""What the layer in front of any run of removed ones adds in their place, for searches that try many such runs.

Fitted on the states of the whole model, so that a run has one map whatever else is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from amoeba_plugin.data.batch import SEQUENCE_COLUMNS, Batch
from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.data.sharing import shard
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.models.adapter import ChannelGroup, group_key
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.runtime.state_store import StateStore
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.depth.steps import Removed
from amoeba_plugin.selection.layer_runs import GIB, LayerRuns
from amoeba_plugin.selection.repair.depth import Folds, fitted, foldable, removed_runs, run_watched
from amoeba_plugin.selection.repair.moments import held_out_rows

LEAST_JUDGING = 8  # rows that judge candidates, an eighth at least; the others fit what is folded


@dataclass
class FoldTable:
    """Maps of a layer's neurons to what the removed layers behind it would have added.

    Attributes:
        path: Of the linear that reads the neurons.
        data: Digest of what they are fitted on.
        group: The neurons.
        share: Of the MLP's output that is added to the residual stream.
        lockstep: Runs the whole model; knows the states before every layer.
        changes: (hidden, neurons), by the layer in front and the first one that is there again.
        progress: Show a progress bar while it fits.
    """

    path: str
    data: str
    group: ChannelGroup
    share: float
    lockstep: Lockstep
    changes: StateStore = field(repr=False)
    progress: bool = True

    @classmethod
    @contextmanager
    def of(cls, runs: LayerRuns, progress: bool = True) -> Iterator[FoldTable | None]:
        """Yield the table of a whole model; ``None`` where nothing can be folded into its layers.

        Args:
            runs: Of the whole model on the data to fit on.
            progress: Show progress bars.
        """
        group, share = foldable(runs), runs.adapter.residual_share(runs.model.config)
        if group is None or share is None:
            yield None
            return
        data = shard(runs.batches)[1]
        with runs.open() as lockstep, StateStore.of(runs.cache_gib * GIB) as changes:
            yield cls(group.consumer.path, data, group, share, lockstep, changes, progress)

    def change(self, front: int, end: int) -> Tensor:
        """Return (hidden, neurons) of a run that :meth:`prepare` has seen."""
        return self.changes[front, end]

    def prepare(self, sets: Sequence[Removed]) -> None:
        """Fit what sets of removed layers need and no set before did; all ranks have to be given the same."""
        layers = len(self.lockstep.layers)
        wanted: dict[int, set[int]] = {}
        for removed in sets:
            kept = tuple(index for index in range(layers) if index not in removed)
            for front, gone in removed_runs(kept, layers).items():
                if (front, gone.stop) not in self.changes:
                    wanted.setdefault(front, set()).add(gone.stop)
        if not wanted:
            return
        first = range(layers if (layers, 0) not in self.lockstep.cached else 0)
        silent = not self.progress or rank() != 0
        with StageBar(
            total=len(first) + len(wanted), desc="folds", unit="layer", disable=silent, leave=False, shorter=LESS_DATA
        ) as bar:
            for index in first:
                self.lockstep.run_layer(index)
                bar.update()
            for front, some in sorted(wanted.items()):
                ends = sorted(some)
                run_watched(self.lockstep, self.group, front)
                for end, change in zip(ends, fitted(self.lockstep, self.group, front, ends), strict=True):
                    self.changes[front, end] = change.float()
                bar.update()

    def weights(self, depth: DepthStrategy) -> Folds:
        """Return, for every depth that loses no sublayers, the weights of the MLPs in front of removed layers."""
        layers = len(self.lockstep.layers)
        runs = {each: removed_runs(kept, layers) for each, kept in depth.kept.items() if each not in depth.lost}
        self.prepare([Removed(range(layers)) - set(depth.kept[each]) for each in runs])
        return {each: {group_key(front, self.group): self._weight(front, gone.stop) for front, gone in behind.items()}
                for each, behind in runs.items() if behind}  # fmt: skip

    def _weight(self, front: int, end: int) -> Tensor:
        weight = self.group.consumer.weight(self.lockstep.layers[front]).detach()
        return (weight.double() + self.change(front, end).to(weight.device) / self.share).to("cpu", weight.dtype)


def parted(batches: Sequence[Batch], least: int = LEAST_JUDGING) -> tuple[list[Batch], list[Batch]]:
    """Return batches of the rows that fit, and of those that judge, told apart by their tokens alone.

    So many judge as :func:`held_out_count` says; none does where rows may belong together, of data with further
    columns.
    """
    if any(set(batch) - set(SEQUENCE_COLUMNS) for batch in batches):
        return list(batches), []
    judging = held_out_rows(batches, least)
    return _rows(batches, [~rows for rows in judging]), _rows(batches, judging)


def _rows(batches: Sequence[Batch], which: Sequence[Tensor]) -> list[Batch]:
    some = [
        {name: values[rows.to(values.device)] for name, values in batch.items()}
        for batch, rows in zip(batches, which, strict=True)
    ]
    return [batch for batch in some if len(batch["input_ids"])]
