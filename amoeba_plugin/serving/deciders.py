"""Which of the feasible decisions a request gets, without having read it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from amoeba_plugin.serving.feasible import Decision, Feasible
from amoeba_plugin.shape import SubnetShape

Decider = Callable[[Feasible], Decision | None]  # None: it has no opinion


@dataclass(frozen=True)
class DeciderOptions:
    """What a decider may be told.

    Attributes:
        shape: Of ``fixed``; ``None``: the largest.
        share: Of ``fixed``.
        seed: Of ``random_feasible``.
    """

    shape: SubnetShape | None = None
    share: Fraction = Fraction(1)
    seed: int = 0


def largest_feasible(options: DeciderOptions) -> Decider:
    """Take the shape that takes longest per token, on as much of the prompt as it has time for."""
    return lambda feasible: best_of(feasible)


def fixed(options: DeciderOptions) -> Decider:
    """Take one shape and share for all requests."""

    def decide(feasible: Feasible) -> Decision:
        shape = next(iter(feasible.latencies)).shape if options.shape is None else options.shape
        return Decision(shape, options.share)

    return decide


def random_feasible(options: DeciderOptions) -> Decider:
    """Draw among those that keep the targets, each equally likely."""
    draw = random.Random(options.seed)
    return lambda feasible: draw.choice(feasible.decisions) if feasible.decisions else None


def best_of(feasible: Feasible) -> Decision | None:
    """Return the feasible decision of the largest shape by time per token, and of those that of the longest prompt."""
    latencies = feasible.latencies
    return max(feasible.decisions, key=lambda each: (latencies[each].tpot, each.share), default=None)


def decided(decider: Decider, feasible: Feasible) -> Decision:
    """Return a decision that keeps the targets: the decider's, or where that does not, the largest that does.

    Raises:
        SloError: If none keeps them.
    """
    possible = feasible.require()
    wanted = decider(feasible)
    if wanted in possible:
        return wanted
    best = best_of(feasible)
    assert best is not None  # there is one that is possible
    return best
