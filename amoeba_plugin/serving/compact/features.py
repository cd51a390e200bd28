"""What the compact model sees of a prompt: the elastic model's own embeddings, or its first layer's outputs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from amoeba_plugin.elastic.model import ElasticModel

DEEP = 24  # layers of a model of which one is within five percent of its time


class Features:
    """The first layers of an elastic model at its whole width, in a module tree of their own on the same weights.

    It may be called in any thread, whatever shape the model has at the time: only weights are shared.

    Args:
        live: At its largest shape.
        layers: How many, 0 or 1; default: 1 of a model so deep that one is a small part of it.
    """

    def __init__(self, live: ElasticModel, layers: int | None = None) -> None:
        if live.shape != live.space.largest:
            live.set_shape(live.space.largest)
        self.layers = layers if layers is not None else int(len(live.layers) >= DEEP)
        self.size = int(live.config.get_text_config().hidden_size)
        weights = itertools.chain(live.model.parameters(), live.model.buffers())
        tree = copy.deepcopy(live.model, {id(each): each for each in weights})
        adapter, first = live.adapter, range(self.layers)
        adapter.set_layers(tree, [adapter.layers(tree)[index] for index in first], tuple(first), live.config)
        self._decoder = adapter.decoder(tree).eval()

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return what the final norm makes of the layers' outputs, (tokens, hidden), fp32."""
        ids = torch.tensor([list(tokens)], device=next(self._decoder.parameters()).device)
        hidden: Tensor = self._decoder(ids, use_cache=False).last_hidden_state[0]
        return hidden.float()
