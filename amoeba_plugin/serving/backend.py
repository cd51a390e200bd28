"""What computes the steps of requests: one elastic model in torch, its weights in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.runtime.compat import cache_name
from amoeba_plugin.shape import ShapeSpace, SubnetShape


class Backend(Protocol):
    """Computes one step of one request at a time, in one thread."""

    @property
    def space(self) -> ShapeSpace:
        """The shapes that requests may get."""

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; ``None``: any number."""

    def prefill(self, shape: SubnetShape, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        """Compute a prompt; return what its next step needs, of this shape alone, and the logits (vocabulary,)."""

    def step(self, shape: SubnetShape, cache: Any, token: int) -> Tensor:
        """Compute one more token; return the logits (vocabulary,)."""


class TorchBackend:
    """An elastic model, switched to a request's shape between two steps.

    A cache of keys and values belongs to the shape it was made at: other shapes have other heads and layers.

    Args:
        live: With or without an adapter on it; in evaluation mode from now on.
    """

    def __init__(self, live: ElasticModel) -> None:
        self._live = live
        live.model.eval()

    @property
    def space(self) -> ShapeSpace:
        """The shapes of the model."""
        return self._live.space

    @property
    def context(self) -> int | None:
        """The positions that the model was made for."""
        return getattr(self._live.model.config, "max_position_embeddings", None)

    def prefill(self, shape: SubnetShape, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        """Compute a prompt; see :class:`Backend`."""
        output = self._run(shape, list(tokens), {})
        return getattr(output, cache_name(self._live.model)), output.logits[0, -1]

    def step(self, shape: SubnetShape, cache: Any, token: int) -> Tensor:
        """Compute one more token; see :class:`Backend`."""
        logits: Tensor = self._run(shape, [token], {cache_name(self._live.model): cache}).logits[0, -1]
        return logits

    @torch.inference_mode()
    def _run(self, shape: SubnetShape, tokens: list[int], given: dict[str, Any]) -> Any:
        if self._live.shape != shape:
            self._live.set_shape(shape)
        ids = torch.tensor([tokens], device=self._live.model.device)
        return self._live.model(ids, use_cache=True, logits_to_keep=1, **given)
