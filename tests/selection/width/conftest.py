"""A ranking of the widths of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.registry import importance_named
from amoeba_plugin.selection.width.ranking import rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from support.batches import make_random_batches
from support.strategies import FINE_WIDTHS


@pytest.fixture
def rank(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., tuple[PreTrainedModel, WidthStrategy]]:
    """Return a function that ranks the widths of a tiny model, and returns both."""

    def rank(model_type: str = "llama", **options: Any) -> tuple[PreTrainedModel, WidthStrategy]:
        model, adapter = tiny_model(model_type), architecture_for(model_type)
        stats = collect_statistics(model, adapter, make_random_batches(lengths=(12, 7)), progress=False)
        options = {"widths": FINE_WIDTHS, "importance": importance_named("flap")} | options
        return model, rank_widths(WidthTask(model, adapter, statistics=stats, **options))

    return rank
