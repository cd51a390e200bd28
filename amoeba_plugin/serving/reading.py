"""A prompt that was read before it is computed: which of its tokens matter, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.feasible import Decision, Feasible


@dataclass(frozen=True)
class Reading:
    """What a compact model makes of a prompt.

    Attributes:
        scores: By token, how much it matters; those of the least are left out first.
        wanted: What it would decide for the prompt, of what is feasible; ``None``: it has no opinion.
    """

    scores: Sequence[float]
    wanted: Callable[[Feasible], Decision | None] = lambda feasible: None


Reader = Callable[[Request], Reading]  # called in the thread of who asks


def kept_positions(tokens: int, droppable: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    """Return the positions of a prompt that stay, in their order.

    >>> kept_positions(6, [1, 2, 3], [9.0, 0.1, 0.9, 0.5, 9.0, 0.0], 5)
    [0, 2, 3, 4, 5]

    Args:
        tokens: Of the whole prompt.
        droppable: Positions that may go, ascending.
        scores: By position; of equal ones the first stays.
        count: How many positions stay; all that may not go do.
    """
    spare = sorted(droppable, key=lambda position: (scores[position], -position))
    gone = set(spare[: tokens - count])
    return [position for position in range(tokens) if position not in gone]
