"""Elastic models with random strategies, for tests of everything that switches shapes."""

from __future__ import annotations

from fractions import Fraction

import torch
from transformers import PreTrainedModel

from amoeba_plugin.architecture import group_key
from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.plugins import architecture_for
from amoeba_plugin.strategy import DepthStrategy, SubnetStrategy, WidthStrategy, model_fingerprint

WIDTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2))
# Neither nested nor a prefix, and the first layer goes: an index that is not renumbered shows.
KEPT = {4: (0, 1, 2, 3), 3: (0, 2, 3), 2: (1, 3)}


def random_strategy(model: PreTrainedModel, seed: int = 0, bias_compensation: bool = False) -> SubnetStrategy:
    """Return a strategy with random orders for a four-layer model; widths keep 4, 3 and 2 of 4 KV groups."""
    generator = torch.Generator().manual_seed(seed)
    adapter = architecture_for(model.config.model_type)
    order, mean, units = {}, {}, {width: {} for width in WIDTHS}
    for layer in range(len(adapter.layers(model))):
        for group in adapter.channel_groups(model.config):
            key = group_key(layer, group)
            order[key] = torch.randperm(group.units, generator=generator)
            mean[key] = torch.randn(group.channels, generator=generator)
            for width in WIDTHS:
                units[width][key] = int(group.units * width)
    width = WidthStrategy(units, order, mean, "random", "uniform", bias_compensation)
    return SubnetStrategy(DepthStrategy(KEPT), width, model_fingerprint(model, adapter))


def random_elastic(model: PreTrainedModel, seed: int = 0, bias_compensation: bool = False) -> ElasticModel:
    """Make a four-layer model elastic with a random strategy."""
    return ElasticModel(model, random_strategy(model, seed, bias_compensation))
