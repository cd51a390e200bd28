"""Keys and values of several requests as those of one batch, for a step in which each gets a token.

On a CPU a step of one token reads all weights and computes little, so that a second request costs next to nothing.
Answers differ in length: shorter ones are filled in front, positions stay their own, and the mask hides what is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache


class Together:
    """Caches of some requests at one shape, which stay as they are until they are given what was computed.

    Args:
        caches: transformers' ``DynamicCache``, of one row each, none of which forgets anything.
    """

    def __init__(self, caches: Sequence[Any]) -> None:
        self._caches, self._batch = caches, DynamicCache()
        self._layers = [index for index, layer in enumerate(caches[0].layers) if layer.is_initialized]
        rows = [[cache.layers[index] for cache in caches] for index in self._layers]
        self.lengths = [layer.keys.shape[-2] for layer in rows[0]]
        for index, layers in zip(self._layers, rows, strict=True):
            keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
            self._batch.update(self._filled(keys), self._filled(values), index)

    def inputs(self, name: str, tokens: Tensor) -> dict[str, Any]:
        """Return what a model takes beside the next tokens, (requests, 1); ``name`` is the cache's."""
        lengths = torch.tensor(self.lengths, device=tokens.device)[:, None]
        longest = max(self.lengths)
        places = torch.arange(longest + 1, device=tokens.device)
        return {
            name: self._batch,
            "attention_mask": (places >= longest - lengths).long(),  # (requests, longest + 1)
            "position_ids": lengths,
        }

    def give_back(self) -> None:
        """Append to every request's cache what the model computed for it."""
        for index in self._layers:
            layer: Any = self._batch.layers[index]
            for row, cache in enumerate(self._caches):
                cache.update(layer.keys[row : row + 1, :, -1:], layer.values[row : row + 1, :, -1:], index)

    def _filled(self, rows: Sequence[Tensor]) -> Tensor:
        """Return (1, heads, length, channels) of each request as (requests, heads, longest, channels)."""
        longest = max(self.lengths)
        return torch.cat([functional.pad(row, (0, 0, longest - row.shape[-2], 0)) for row in rows])
