"""Shapes tried on calibration data with what a repair makes of them, all in one run through the layers.

Every layer is repaired once for all of them, while it is at hand; the states of each shape go on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from amoeba_plugin.elastic.group import consumer_weight
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.models.adapter import ChannelGroup, group_key
from amoeba_plugin.models.kept import Kept
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.objectives import Objective, Score
from amoeba_plugin.selection.over_ranks import joined, scores_over_ranks
from amoeba_plugin.selection.repair.depth import Folds
from amoeba_plugin.selection.repair.width import WidthRepair

Sizes = Mapping[str, int]  # units by part


@dataclass(frozen=True)
class Trial:
    """A shape that is tried.

    Attributes:
        sizes: Units of every part, the same in every layer but the anchors.
        depth: Layers; ``None``: all.
        anchors: Layers that keep everything.
    """

    sizes: Sizes
    depth: float | None = None
    anchors: Collection[int] = ()

    def units(self, layer: int, group: ChannelGroup) -> int:
        """Return the units that a group of a layer keeps."""
        return group.units if layer in self.anchors else self.sizes[group.name]

    def keyed(self, layer: int, groups: Sequence[ChannelGroup]) -> dict[str, int]:
        """Return the units of all groups of a layer, by group key."""
        return {group_key(layer, group): self.units(layer, group) for group in groups}


@dataclass(frozen=True)
class Trials:
    """Scores shapes of a model, repaired from statistics of the whole.

    Attributes:
        runs: Of the whole model, elastic while shapes are tried.
        objective: One made of observations.
        repair: What widths are repaired by; ``None``: they are as they are cut.
        kept: Layers of the depths that may be tried.
        folds: Of these depths the weights of layers in front of removed ones, channels in the model's order.
    """

    runs: LayerRuns
    objective: Objective
    repair: WidthRepair | None = None
    kept: Mapping[float, Sequence[Kept]] = field(default_factory=dict)
    folds: Folds = field(default_factory=dict)

    def scores(
        self, elastic: ElasticModel, trials: Sequence[Trial], progress: Callable[[], object] = lambda: None
    ) -> list[Score]:
        """Return the score of every trial, over all ranks.

        Args:
            elastic: The model, its channels in order; its shape is to be set anew afterwards.
            trials: To be scored.
            progress: Called after every layer.
        """
        batches, groups = range(len(self.runs.batches)), elastic.adapter.channel_groups(elastic.config)
        with self.runs.open() as lockstep:
            for index in range(len(lockstep.layers)):
                repaired = self._repaired(elastic, index, trials)
                for number, trial in enumerate(trials):
                    if self._has(trial, index):
                        elastic.set_layer_units(index, trial.keyed(index, groups), repaired[number])
                        for batch in batches:
                            lockstep.pass_on(number, index, batch)
                progress()
            observed = [
                joined([lockstep.observe_passed(self.objective, number, batch) for batch in batches])
                for number in range(len(trials))
            ]
        return scores_over_ranks(self.objective, observed)

    def _has(self, trial: Trial, layer: int) -> bool:
        return trial.depth is None or layer in self.kept[trial.depth]

    def _repaired(self, elastic: ElasticModel, layer: int, trials: Sequence[Trial]) -> list[dict[str, Tensor]]:
        """Return for every trial the repaired weights of a layer's consumers, by group key."""
        found: list[dict[str, Tensor]] = [{} for _ in trials]
        for group in elastic.adapter.channel_groups(elastic.config):
            key, size = group_key(layer, group), group.consumer.channels_per_unit
            order = elastic.strategy.width.order[key]
            columns = group.consumer.channels(order)
            folded = {depth: held[key][:, columns] for depth, held in self.folds.items() if key in held}
            for depth, weight in [(None, consumer_weight(elastic.layers[layer], group)), *folded.items()]:
                sizes = {
                    number: trial.units(layer, group)
                    for number, trial in enumerate(trials)
                    if self._has(trial, layer) and (trial.depth if trial.depth in folded else None) == depth
                }
                repaired: dict[int, Tensor] = {}
                if self.repair is not None:
                    repaired = self.repair.columns(key, group, weight, order, list(sizes.values()))
                for number, units in sizes.items():
                    if units in repaired:
                        found[number][key] = repaired[units]
                    elif depth is not None:
                        found[number][key] = weight[:, : units * size]
        return found
