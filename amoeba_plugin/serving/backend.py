"""What computes the steps of requests: one elastic model in torch, its weights in memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.runtime.compat import cache_name, forgets
from amoeba_plugin.serving.together import Together
from amoeba_plugin.shape import ShapeSpace, SubnetShape

AT_ONCE = 8  # requests: their keys and values are copied for every step, which costs the more the longer they are


class Backend(Protocol):
    """Computes a step at a time, in one thread."""

    @property
    def space(self) -> ShapeSpace:
        """The shapes that requests may get."""

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; ``None``: any number."""

    def prefill(self, shape: SubnetShape, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        """Compute a prompt; return what its next step needs, of this shape alone, and the logits (vocabulary,)."""

    @property
    def at_once(self) -> int:
        """Requests at one shape whose next tokens :meth:`steps` computes faster together than one by one."""

    def step(self, shape: SubnetShape, cache: Any, token: int) -> Tensor:
        """Compute one more token; return the logits (vocabulary,)."""

    def steps(self, shape: SubnetShape, caches: Sequence[Any], tokens: Sequence[int]) -> Sequence[Tensor]:
        """Compute one more token of several requests, ``at_once`` at most; return the logits of each, (vocabulary,).

        Where it raises, no cache has changed.
        """


class TorchBackend:
    """An elastic model, switched to a request's shape between two steps.

    A cache of keys and values belongs to the shape it was made at: other shapes have other heads and layers.

    Args:
        live: With or without an adapter on it; in evaluation mode from now on.

    Attributes:
        switches: How often the shape changed.
    """

    def __init__(self, live: ElasticModel) -> None:
        self._live = live
        self.switches = 0
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
        return self.extend(shape, None, tokens)

    def step(self, shape: SubnetShape, cache: Any, token: int) -> Tensor:
        """Compute one more token; see :class:`Backend`."""
        return self.extend(shape, cache, [token])[1]

    def extend(self, shape: SubnetShape, cache: Any, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        """Compute some more tokens.

        Args:
            shape: Of the cache.
            cache: ``None``: there is none yet.
            tokens: Behind those that the cache holds.

        Returns:
            The cache, and the logits behind the last of the tokens, (vocabulary,).
        """
        cache, rows = self.rows(shape, cache, tokens, 1)
        return cache, rows[0]

    @property
    def at_once(self) -> int:
        """Eight, where keys and values are all that a model remembers, and all of them stay."""
        return 1 if forgets(self._live.config) else AT_ONCE

    @torch.inference_mode()
    def steps(self, shape: SubnetShape, caches: Sequence[Any], tokens: Sequence[int]) -> Sequence[Tensor]:
        """Compute one more token of several requests; see :class:`Backend`.

        Shorter ones are filled in front, and what is filled is masked: no request sees another.
        """
        self._switch(shape)
        together = Together(caches)
        ids = torch.tensor(tokens, device=self._live.model.device)[:, None]
        logits = self._live.model(ids, use_cache=True, **together.inputs(cache_name(self._live.model), ids)).logits
        together.give_back()
        return list(logits[:, -1])

    def _switch(self, shape: SubnetShape) -> None:
        if self._live.shape != shape:
            self._live.set_shape(shape)
            self.switches += 1

    @torch.inference_mode()
    def rows(self, shape: SubnetShape, cache: Any, tokens: Sequence[int], count: int) -> tuple[Any, Tensor]:
        """Do what :meth:`extend` does; return the logits behind the last ``count`` tokens, (count, vocabulary)."""
        self._switch(shape)
        name = cache_name(self._live.model)
        given = {} if cache is None else {name: cache}
        ids = torch.tensor([list(tokens)], device=self._live.model.device)
        output = self._live.model(ids, use_cache=True, logits_to_keep=count, **given)
        return getattr(output, name), output.logits[0]
