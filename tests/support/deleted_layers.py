"""What a search by depth must find: models that never had some layers, their loss, and the recurrence restated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence, Set
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


def deleted(model: PreTrainedModel, removed: Set[int]) -> PreTrainedModel:
    """Return a copy of a model that never had some layers."""
    model = copy.deepcopy(model)
    decoder = model.get_decoder()
    kept = [index for index in range(len(decoder.layers)) if index not in removed]
    decoder.layers = nn.ModuleList([decoder.layers[index] for index in kept])
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def plain_loss(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> float:
    """Return the mean of nats per target, in float64."""
    nats, tokens = 0.0, 0
    for batch in batches:
        logits = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits[:, :-1].double()
        picked = logits.log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
        mask = batch["labels"][:, 1:] != -100
        nats, tokens = nats - picked[mask].sum().item(), tokens + int(mask.sum())
    return nats / tokens


def recurrence(
    candidates: int, most: int, scored: Callable[[frozenset[int]], tuple[float, float]]
) -> dict[int, tuple[frozenset[int], tuple[float, float]]]:
    """Restate the recurrence top-down; ``scored`` returns (badness, badness among equals)."""

    @cache
    def cell(n: int, m: int) -> tuple[frozenset[int], tuple[float, float]]:
        if m == 0:
            return frozenset(), (math.nan, math.nan)  # its metric is never read
        removed = cell(n - 1, m - 1)[0] | {candidates - n}
        score = scored(removed)
        if n > m and not score < cell(n - 1, m)[1]:
            return cell(n - 1, m)
        return removed, score

    return {m: cell(candidates, m) for m in range(1, most + 1)}
