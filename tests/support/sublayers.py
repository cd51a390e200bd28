"""Models in which the projections that end missing sublayers are zero: what a subnet without them must compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy
from amoeba_plugin.models.kept import Kept, read_kept
from amoeba_plugin.models.registry import architecture_for
from support.architectures import CONFIGS
from support.models import random_tokens
from support.strategies import random_strategy

# Written down here, not asked of the adapters: the parameters that end attention and MLP.
ENDS = {"attention": ("self_attn.o_proj", "self_attn.out_proj", "attention.dense"),
        "mlp": ("mlp.down_proj", "mlp.experts.down_proj", "mlp.dense_4h_to_h", "fc2")}  # fmt: skip
# The first attention goes: the cache is asked how long it is at layer 0. Layer 1 goes as a whole at 2.5 and 2.
TABLE: dict[str, list[Kept]] = {
    "3.5": ["0.mlp", 1, 2, 3], "3": [0, "1.attention", "2.mlp", 3], "2.5": ["0.mlp", 2, 3],
    "2": ["0.mlp", "2.attention", 3], "1": ["1.attention", "3.mlp"],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = CONFIGS | {
    "gpt_neox in sequence": CONFIGS["gpt_neox"] | {"use_parallel_residual": False},
    "opt, norms behind": CONFIGS["opt"] | {"do_layer_norm_before": False},
}
POSITIONS = 9


def tokens_of(config: Mapping[str, Any]) -> Tensor:
    """Return tokens of a configuration's vocabulary; the same at every call."""
    return random_tokens(config["vocab_size"], POSITIONS)


def zeroed(model: PreTrainedModel, kept: Sequence[Kept]) -> PreTrainedModel:
    """Return a copy whose missing sublayers end in zeros, and whose missing layers are deleted."""
    model = copy.deepcopy(model)
    layers, lost = read_kept(kept)
    decoder = architecture_for(model.config.model_type).decoder(model)
    found = 0
    with torch.no_grad():
        for index, part in lost.items():
            for name, parameter in decoder.layers[index].named_parameters():
                if name.removesuffix(".weight").removesuffix(".bias") in ENDS[part]:
                    parameter.zero_()
                    found += 1
    assert found >= len(lost)
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in layers])
    for name in ("layer_types", "no_rope_layers"):
        if getattr(model.config, name, None):
            setattr(model.config, name, [getattr(model.config, name)[index] for index in layers])
    model.config.num_hidden_layers = len(layers)
    return model


def elastic_of(model: PreTrainedModel, table: Mapping[str, list[Kept]] = TABLE, **options: Any) -> ElasticModel:
    """Make a model elastic with the depths of a table, which names sublayers."""
    strategy = random_strategy(model, **options)
    return ElasticModel(model, SubnetStrategy(DepthStrategy.given(table, 4), strategy.width, strategy.fingerprint))
