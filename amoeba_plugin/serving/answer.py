"""What a request asks for and what it gets, token by token, from a worker in another thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from amoeba_plugin.serving.feasible import Decision
from amoeba_plugin.serving.sampling import Sampling
from amoeba_plugin.serving.slo import Latency, Slo
from amoeba_plugin.shape import SubnetShape

End = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Request:
    """A prompt, and what its answer must keep to.

    Attributes:
        tokens: Of the prompt.
        slo: Targets for time.
        most: Tokens of the answer, at most.
        sampling: How tokens are drawn.
        ends: Tokens that end the answer; they are not part of it.
        best_effort: Be answered below the targets where they cannot be kept, rather than refused.
        shape: That it must get; ``None``: the decider's.
        alternatives: How many of the likeliest tokens each piece tells beside its own.
        droppable: Positions of the prompt that may be left out, ascending: no question, no template.
    """

    tokens: Sequence[int]
    slo: Slo = field(default_factory=Slo)
    most: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    ends: Collection[int] = ()
    best_effort: bool = False
    shape: SubnetShape | None = None
    alternatives: int = 0
    droppable: Sequence[int] = ()


@dataclass(frozen=True)
class Piece:
    """One token of an answer, and the logarithm of the probability that the model gives it.

    Attributes:
        token: That was drawn.
        log_probability: Of the model, whatever the sampling made of it.
        alternatives: The likeliest tokens, each with its own; as many as the request asked for.
    """

    token: int
    log_probability: float
    alternatives: Sequence[tuple[int, float]] = ()


class Answer:
    """An answer that is being computed; iterate over it for its pieces.

    Args:
        decision: What the request got.
        kept: Positions of the prompt that are computed, ascending.
        promised: When tokens will be there, if steps take what was predicted.
        in_time: Whether that keeps the request's targets.
        on_cancel: Called once, when nobody wants the rest.
    """

    def __init__(
        self, decision: Decision, kept: Sequence[int], promised: Latency, in_time: bool,
        on_cancel: Callable[[], None],
    ) -> None:  # fmt: skip
        self.decision, self.kept, self.promised, self.in_time = decision, kept, promised, in_time
        self.measured: Latency | None = None
        self.end: End | None = None
        self.error: str = ""
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._on_cancel, self._over = on_cancel, threading.Event()
        self._tell: Callable[[Piece | None], object] = self._pieces.put
        self._telling = threading.Lock()

    def __iter__(self) -> Iterator[Piece]:
        """Yield the pieces as they come; ends with the answer, whose ``end`` says how."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for whoever asks again

    def follow(self, tell: Callable[[Piece | None], object]) -> None:
        """Have every piece told as it comes, in place of iterating; ``None`` is told at the end.

        Args:
            tell: Called from the worker's thread, which waits for it; must not raise. What came before is told at once.
        """
        with self._telling:
            while not self._pieces.empty():
                tell(self._pieces.get())
            self._tell = tell

    def cancel(self) -> None:
        """Say that nobody wants the rest; it ends within a step."""
        if not self._over.is_set():
            self._on_cancel()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; tell whether it has."""
        return self._over.wait(seconds)

    def put(self, piece: Piece) -> None:
        """Hand over a piece; for the worker."""
        with self._telling:
            self._tell(piece)

    def close(self, end: End, measured: Latency | None = None, error: str = "") -> None:
        """End it; for the worker."""
        self.end, self.measured, self.error = end, measured, error
        self._over.set()
        with self._telling:
            self._tell(None)
