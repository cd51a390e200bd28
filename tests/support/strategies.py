"""Strategies of random orders, and one whose layers differ in size."""

from __future__ import annotations

from fractions import Fraction

from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.testing.random_models import KEPT, WIDTHS, random_strategy

# Halves of units among them, and less than a unit of a small group.
FINE_WIDTHS = [Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)]
__all__ = ["FINE_WIDTHS", "KEPT", "WIDTHS", "random_strategy", "uneven_strategy"]


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
