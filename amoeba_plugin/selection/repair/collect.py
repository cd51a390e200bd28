"""One run of the calibration data, a layer at a time, that sees the inputs of every linear that reads channels."""

from __future__ import annotations

from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.selection.activation_stats import tell_idle
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.repair.moments import ChannelMoments, held_out_rows, watched


def collect_moments(runs: LayerRuns, moments: ChannelMoments, progress: bool = True) -> None:
    """Fill the moments, and statistics, of all groups of all layers, from the batches of all ranks.

    Memory holds the moments of one layer beside what ``moments`` keeps.

    Args:
        runs: Of a whole model, which is left as it was.
        moments: Takes what is found, channels in the model's order.
        progress: Show a progress bar.

    Raises:
        DataError: If an input is NaN or infinite.
    """
    groups, layers = runs.adapter.channel_groups(runs.model.config), len(runs.adapter.layers(runs.model))
    silent, held_out = not progress or rank() != 0, held_out_rows(runs.batches)
    with StageBar(total=layers, desc="channel statistics", unit="layer", disable=silent, shorter=LESS_DATA) as bar:
        for index, layer, run in runs.layers():
            keyed = {group_key(index, group): group for group in groups}
            with watched(layer, keyed, runs.batches, held_out) as (found, begin):
                run(begin)
            for key, each in found.items():
                moments[key] = each.over_ranks()
            bar.update()
    tell_idle(moments.stats)
