"""A model whose channels are in order of importance for a while, to be tried at sizes that are not settled yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.fingerprint import model_fingerprint


@contextmanager
def in_order(model: PreTrainedModel, adapter: ArchitectureAdapter, width: WidthStrategy) -> Iterator[ElasticModel]:
    """Yield a model made elastic, whole, in the order of a strategy; it is as it was, to the last bit, afterwards.

    Raises:
        ArchitectureError: If the model cannot be made elastic, as when accelerate offloads weights of it.
    """
    depth = DepthStrategy.whole(len(adapter.layers(model)))
    whole = replace(width, units=WidthStrategy.whole().units, bias_compensation=False)
    elastic = ElasticModel(model, SubnetStrategy(depth, whole, model_fingerprint(model, adapter)))
    try:
        yield elastic
    finally:
        elastic.release(original_order=True)
