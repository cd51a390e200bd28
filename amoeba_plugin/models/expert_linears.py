"""The experts of a mixture as linears, one for each projection of each expert, as quantizers see them; no weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.models.adapter import ArchitectureAdapter


def take_apart(model: PreTrainedModel, adapter: ArchitectureAdapter) -> PreTrainedModel:
    """Replace the experts of a model without weights by linears named as llm-compressor names them, in place.

    Args:
        model: On "meta"; layers may have lost their experts.
        adapter: Its architecture.

    Returns:
        The model; it cannot run.
    """
    consumers = [group.consumer for group in adapter.channel_groups(model.config) if group.consumer.expert is not None]
    for layer in adapter.layers(model) if consumers else ():
        experts = dict(layer.named_modules()).get(consumers[0].path)
        if experts is not None:
            count, hidden, neurons = experts.get_parameter(consumers[0].parameter).shape
            with torch.device("meta"):
                layer.set_submodule(consumers[0].path, nn.ModuleList(_linears(hidden, neurons) for _ in range(count)))
    return model


def _linears(hidden: int, neurons: int) -> nn.ModuleDict:
    sizes = {"gate_proj": (hidden, neurons), "up_proj": (hidden, neurons), "down_proj": (neurons, hidden)}
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
