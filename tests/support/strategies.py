"""Strategies of random orders, and one whose layers differ in size."""

from __future__ import annotations

from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.testing.architectures import KEPT, WIDTHS, random_strategy

__all__ = ["KEPT", "WIDTHS", "random_strategy", "uneven_strategy"]


def uneven_strategy(model: PreTrainedModel, bias_compensation: bool = False) -> SubnetStrategy:
    """Return a strategy whose narrower widths keep other numbers of units in every layer."""
    strategy = random_strategy(model, bias_compensation=bias_compensation)
    for width, units in strategy.width.units.items():
        if width != 1:
            for key in units:
                layer = int(key.partition(".")[0])  # the experts of a layer keep the same number
                step = 8 if key.count(".") == 2 else 3  # an expert's rows must fill 16 bytes
                units[key] -= layer % 2 if key.endswith("attention") else step * layer
    return strategy
