"""Self-drafting: a small shape writes some tokens ahead, a larger one of the same weights checks them all at once.

Speculative decoding (arXiv:2211.17192) whose drafter is a second tree of modules on the tensors of the model itself.
What is handed out are the logits of the larger shape, whatever the smaller one wrote, so that answers are its own,
drawn in any way. A step that checks takes longer; those behind it, whose tokens were foreseen, take nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.second_tree import second_tree
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.runtime.compat import forgets
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.shape import ShapeSpace, SubnetShape

AHEAD = 5  # tokens that are drafted at most
SURE = 0.4  # probability below which a drafted token is the last (transformers' assistant_confidence_threshold)


@dataclass
class Foreseen:
    """Keys and values of one request, and what was computed ahead of it.

    Attributes:
        cache: Of the larger shape; it may hold tokens that were drafted and are not the answer's.
        known: The tokens that surely are.
        ahead: Drafted tokens that are next, with the logits behind each, (vocabulary,).
        drafts: Keys and values of the smaller shape; ``None``: it has seen nothing.
        drafted: How many tokens those are of.
    """

    cache: Any
    known: list[int]
    ahead: list[tuple[int, Tensor]] = field(default_factory=list)
    drafts: Any = None
    drafted: int = 0


@dataclass
class Counts:
    """Of all requests so far.

    Attributes:
        drafted: Tokens that a smaller shape wrote, and that were taken or thrown away.
        accepted: Those of them that were the answer's.
    """

    drafted: int = 0
    accepted: int = 0


class DraftingBackend:
    """An elastic model of which smaller shapes draft for larger ones; weights are in memory once.

    Args:
        live: As of :class:`TorchBackend`.
        drafters: By the shape that they draft for; shapes that are not named decode alone.
        ahead: Tokens that are drafted at most.

    Raises:
        ArchitectureError: If layers attend within a window: what left it cannot be brought back.
    """

    def __init__(self, live: ElasticModel, drafters: Mapping[SubnetShape, SubnetShape], ahead: int = AHEAD) -> None:
        if forgets(live.config):
            raise ArchitectureError(
                f"{live.config.model_type} attends within a window, and drafts that are not accepted cannot be taken "
                "back from its cache; serve it without drafters"
            )
        self._larger, self._smaller = TorchBackend(live), TorchBackend(second_tree(live))
        self._drafters, self._ahead = drafters, ahead
        self.counts = Counts()

    @property
    def space(self) -> ShapeSpace:
        """The shapes of the model."""
        return self._larger.space

    @property
    def switches(self) -> int:
        """How often the shape of a tree of modules changed."""
        return self._larger.switches + self._smaller.switches

    @property
    def context(self) -> int | None:
        """The positions that the model was made for."""
        return self._larger.context

    @property
    def at_once(self) -> int:
        """One: requests are ahead by as many tokens as each could foresee."""
        return 1

    def steps(self, shape: SubnetShape, caches: Sequence[Any], tokens: Sequence[int]) -> Sequence[Tensor]:
        """Compute the next token of one request; see :class:`Backend`."""
        return [self.step(shape, cache, token) for cache, token in zip(caches, tokens, strict=True)]

    def prefill(self, shape: SubnetShape, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        """Compute a prompt; the smaller shape reads it when it is to draft."""
        cache, logits = self._larger.prefill(shape, tokens)
        if shape in self._drafters:
            cache = Foreseen(cache, list(tokens))
        return cache, logits

    def step(self, shape: SubnetShape, cache: Any, token: int) -> Tensor:
        """Compute one more token, unless it was foreseen; see :class:`Backend`."""
        if not isinstance(cache, Foreseen):
            return self._larger.step(shape, cache, token)
        foreseen, logits = cache.ahead.pop(0) if cache.ahead else (None, None)
        if foreseen == token:
            assert logits is not None
            self.counts.accepted += 1
            self.counts.drafted += 1
        else:
            if foreseen is not None:
                self.counts.drafted += 1 + len(cache.ahead)
                cache.cache.crop(-1 - len(cache.ahead))
            logits = self._check(shape, cache, token)
        cache.known.append(token)
        return logits

    def _check(self, shape: SubnetShape, cache: Foreseen, token: int) -> Tensor:
        """Draft behind a token and compute what was drafted; return the logits behind the token."""
        drafts = self._draft(self._drafters[shape], cache, token)
        _, rows = self._larger.rows(shape, cache.cache, [token, *drafts], 1 + len(drafts))
        cache.ahead = list(zip(drafts, rows[1:], strict=True))
        return rows[0]

    def _draft(self, shape: SubnetShape, cache: Foreseen, token: int) -> list[int]:
        """Return the tokens that the smaller shape expects behind one, as long as it is sure."""
        if cache.drafted > len(cache.known):  # drafts that were not the answer's
            cache.drafts.crop(len(cache.known) - cache.drafted)
            cache.drafted = len(cache.known)
        new, found = [*cache.known[cache.drafted :], token], list[int]()
        room = self._ahead if self.context is None else min(self._ahead, self.context - len(cache.known) - 1)
        while len(found) < room:
            cache.drafts, logits = self._smaller.extend(shape, cache.drafts, new)
            cache.drafted += len(new)
            likeliest = logits.softmax(-1).max(-1)
            new = [int(likeliest.indices)]
            found += new
            if float(likeliest.values) < SURE:
                break
        return found
