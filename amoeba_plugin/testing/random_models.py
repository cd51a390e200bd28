"""Tiny models, strategies, repaired weights and adapters with nothing left at a default: those hide wrong indices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import Place, Repairs
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.smol import SmolConfig

WIDTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2))
# Neither nested nor a prefix, and the first layer goes: an index that is not renumbered shows.
KEPT: dict[float, tuple[int, ...]] = {4: (0, 1, 2, 3), 3: (0, 2, 3), 2: (1, 3)}


def random_model(config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """Return a causal LM with nothing left at zero or one, fp32, in evaluation mode; same seed, same weights."""
    fields = dict(config)
    built = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norm weights are made ones, biases zeros
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:  # std 0.02 would leave every layer next to the identity
                parameter.normal_(0, 0.08)
        model.eval()
    return model


def random_strategy(model: PreTrainedModel, seed: int = 0, bias_compensation: bool = False) -> SubnetStrategy:
    """Return a strategy of random orders for a model of four layers: depths 4, 3, 2 and widths 1, 3/4, 1/2."""
    generator = torch.Generator().manual_seed(seed)
    adapter = architecture_for(model.config.model_type)
    order, mean, units = {}, {}, {width: dict[str, int]() for width in WIDTHS}
    for layer in range(len(adapter.layers(model))):
        for group in adapter.channel_groups(model.config):
            key = group_key(layer, group)
            order[key] = torch.randperm(group.units, generator=generator)
            mean[key] = torch.randn(group.channels, generator=generator)
            for width in WIDTHS:
                units[width][key] = int(group.units * width)
    widths = WidthStrategy(units, order, mean, "random", "uniform", bias_compensation)
    return SubnetStrategy(DepthStrategy(KEPT), widths, model_fingerprint(model, adapter))


def random_repairs(model: PreTrainedModel, strategy: SubnetStrategy, seed: int = 2) -> Repairs:
    """Return random weights of all consumers at the narrower widths, and at the shapes 3x1 and 3x1/2 others."""
    generator = torch.Generator().manual_seed(seed)
    adapter = architecture_for(model.config.model_type)
    weights: dict[Place, dict[str, Tensor]] = {}
    for place in ((None, WIDTHS[1]), (None, WIDTHS[2]), (3.0, WIDTHS[0]), (3.0, WIDTHS[2])):
        for layer, group in itertools.product(range(4), adapter.channel_groups(model.config)):
            kept = strategy.width.units[place[1]][group_key(layer, group)] * group.consumer.channels_per_unit
            rows = group.consumer.size(adapter.layers(model)[layer])[0]
            each = torch.randn(rows, kept, generator=generator) * 0.08
            weights.setdefault(place, {})[group_key(layer, group)] = each
    return Repairs(weights, "random")


def attach_random_smol(elastic: ElasticModel) -> PeftModel:
    """Put a SMOL adapter whose every parameter is random on all linears; in evaluation mode."""
    config = SmolConfig(r=4, num_experts=3, top_k=2, target_modules="all-linear")
    model = attach_smol(elastic, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model
