"""What a ranking of units is asked: the model, what was seen of it, and how much every width keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.selection.activation_stats import ActivationStats
from amoeba_plugin.selection.importance import AnyImportance
from amoeba_plugin.selection.repair.moments import ChannelMoments


@dataclass(frozen=True)
class WidthTask:
    """What a ranking is asked: whose units to order, by what, and how many of them each width keeps.

    Attributes:
        model: The dense model; as it was afterwards, to the last bit.
        adapter: Its architecture.
        importance: Scores channels or units.
        widths: Shares kept, in (0, 1]. 1 keeps everything, whatever ``round_to`` is.
        statistics: By ``group_key``, from ``collect_statistics``; may lack groups where nothing needs them.
        gradients: From ``loss_gradients`` of ``coupled_parameters``, for importances that need them.
        allocation: ``uniform`` keeps the same number of units in every layer: the share of that group's units.
            ``global`` is the paper's: one threshold over the units of all layers, so that the share counts the
            parameters of units, and layers differ; every group keeps its best unit at least, and all experts of a
            layer the same number. ``measured`` is for ``measured_widths`` alone.
        round_to: Consumer's channels that kept sizes are multiples of (the nearest one), for all groups or by group
            name. With ``global`` it moves the share away from the one asked for.
        anchors: Indices of layers that keep full width (ELMS). The others make up for them: their share is
            (width * layers - anchors) / (layers - anchors), so that the width is still that of the whole model. With
            ``global`` they are left out of the threshold, and their parameters count as kept.
        bias_compensation: Also store every channel's mean input.
        moments: From ``collect_moments``, for importances that need them.
        totals: Shares kept of the units of all layers, depth and width together, in (0, 1]; for ``measured_widths``.
    """

    model: PreTrainedModel
    adapter: ArchitectureAdapter
    importance: AnyImportance
    widths: Sequence[Fraction]
    statistics: Mapping[str, ActivationStats] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    allocation: Literal["uniform", "global", "measured"] = "uniform"
    round_to: Mapping[str, int] | int = 1
    anchors: Collection[int] = ()
    bias_compensation: bool = False
    moments: ChannelMoments | None = None
    totals: Sequence[Fraction] = ()
