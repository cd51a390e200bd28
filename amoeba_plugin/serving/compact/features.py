"""What the compact model sees of a prompt: the elastic model's own embeddings, or its first layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.second_tree import second_tree

DEEP = 24  # layers from which on one is a small part of the whole model


class PromptFeatures(Protocol):
    """What heads stand on; it may be called in any thread.

    Attributes:
        size: Of a token's features.
    """

    size: int

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return the features of a prompt's tokens, (tokens, size), fp32, on the CPU."""


class Features:
    """The first layers of an elastic model at its whole width, in a module tree of their own on the same weights.

    It may be called in any thread, whatever shape the model has at the time: only weights are shared.

    Args:
        live: At any shape.
        layers: How many, 0 or 1; default: 1 of a model so deep that one is a small part of it.
    """

    def __init__(self, live: ElasticModel, layers: int | None = None) -> None:
        self.layers = layers if layers is not None else int(len(live.layers) >= DEEP)
        self.size = int(live.config.get_text_config().hidden_size)
        second, first = second_tree(live), tuple(range(self.layers))
        second.set_shape(second.space.largest)
        second.adapter.set_layers(second.model, [second.layers[index] for index in first], first, second.config)
        self._decoder = second.adapter.decoder(second.model).eval()

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return what the final norm makes of the layers' outputs, (tokens, hidden), fp32, on the CPU."""
        ids = torch.tensor([list(tokens)], device=next(self._decoder.parameters()).device)
        hidden: Tensor = self._decoder(ids, use_cache=False).last_hidden_state[0]
        return hidden.float().cpu()
