"""An answer as it grows, for asyncio: its text, and the tokens whose text that is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from amoeba_plugin.serving.answer import Answer, Piece
from amoeba_plugin.serving.detokenizer import Detokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """A token of an answer.

    Attributes:
        piece: It, and its probability.
        start: Characters of the answer in front of it.
    """

    piece: Piece
    start: int


@dataclass(frozen=True)
class Shown:
    """What of an answer can be shown next.

    Attributes:
        text: May be empty at the end.
        tokens: That begin in it.
    """

    text: str
    tokens: list[Told]


class Following:
    """Follows one answer, from a loop that runs; whoever leaves it early cancels the answer.

    Args:
        answer: Of the service.
        tokenizer: Of the model.
        stops: Texts that end it.
        on_end: Called once it has ended, from the worker's thread.

    Attributes:
        produced: Tokens so far, of those that were taken from the worker.
        computed: Tokens that the worker handed over.
        stopped: Whether a stop text ended it.
    """

    def __init__(
        self, answer: Answer, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...],
        on_end: Callable[[Following], object],
    ) -> None:  # fmt: skip
        self.answer, self._detokenizer = answer, Detokenizer(tokenizer, stops)
        self._waiting: list[Told] = []
        self.produced, self.computed, self.stopped = 0, 0, False
        self._news, self._on_end = asyncio.Queue[Piece | None](), on_end
        self._loop = asyncio.get_running_loop()
        answer.follow(self._tell)

    async def shown(self) -> AsyncGenerator[Shown, None]:
        """Yield what can be shown, until the answer has ended, and tells how."""
        try:
            while (piece := await self._news.get()) is not None:
                if self.stopped:
                    continue  # the step that was computed when it ended
                if (found := self._next(piece)) is not None:
                    yield found
                if self._detokenizer.stopped:
                    self.stopped = True
                    self.answer.cancel()
            yield self._last()
        finally:
            self.answer.cancel()

    def _tell(self, piece: Piece | None) -> None:
        with suppress(RuntimeError):  # the loop is over, and nobody listens
            self._loop.call_soon_threadsafe(self._news.put_nowait, piece)
        self.computed += piece is not None
        if piece is None:
            try:
                self._on_end(self)
            except Exception:  # the worker's thread goes on with other answers
                logger.exception("an answer that has ended was not counted")

    def _next(self, piece: Piece) -> Shown | None:
        self.produced += 1
        self._waiting.append(Told(piece, self._detokenizer.length))
        text = self._detokenizer.push(piece.token)
        tokens = self._begun()
        return Shown(text, tokens) if text or tokens else None

    def _last(self) -> Shown:
        text = self._detokenizer.finish()
        self.stopped |= self._detokenizer.stopped
        return Shown(text, self._begun() if self.stopped else self._waiting)

    def _begun(self) -> list[Told]:
        """Take the tokens that begin in what was shown."""
        shown = len(self._detokenizer.text)
        count = sum(told.start < shown for told in self._waiting)
        found, self._waiting = self._waiting[:count], self._waiting[count:]
        return found
