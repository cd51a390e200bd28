"""Elastic models with random strategies, for tests of everything that switches shapes."""

from __future__ import annotations

from transformers import PreTrainedModel

from amoeba_plugin.conformance import KEPT, WIDTHS, random_strategy
from amoeba_plugin.elastic import ElasticModel

__all__ = ["KEPT", "WIDTHS", "random_elastic", "random_strategy"]


def random_elastic(model: PreTrainedModel, seed: int = 0, bias_compensation: bool = False) -> ElasticModel:
    """Make a four-layer model elastic with a random strategy."""
    return ElasticModel(model, random_strategy(model, seed, bias_compensation))
