"""The search over depths with its task and its options written in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.selection.depth.search import search_depths
from amoeba_plugin.selection.depth.task import DepthTask, SearchOptions
from amoeba_plugin.selection.objectives import Objective


def searched(
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    min_depth: int,
    keep_last: int = 1,
    progress: bool = False,
    **options: Any,
) -> DepthStrategy:
    """Return what the dynamic program finds; ``options`` are those of ``SearchOptions``."""
    task = DepthTask(model, adapter, objective, batches, min_depth, keep_last, progress, SearchOptions(**options))
    return search_depths(task)
