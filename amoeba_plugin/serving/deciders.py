"""Which of the feasible decisions a request gets."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from amoeba_plugin.serving.feasible import Decision, Feasible
from amoeba_plugin.serving.reading import Reading
from amoeba_plugin.shape import SubnetShape

Decider = Callable[[Feasible, Reading | None], Decision | None]  # of what nobody read; None: it has no opinion


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
    """Take the largest shape, by what it takes per token, on as much of the prompt as it has time for."""
    return lambda feasible, reading: best_of(feasible)


def fixed(options: DeciderOptions) -> Decider:
    """Take one shape and share for all requests."""

    def decide(feasible: Feasible, reading: Reading | None) -> Decision:
        shape = next(iter(feasible.latencies)).shape if options.shape is None else options.shape
        return Decision(shape, options.share)

    return decide


def random_feasible(options: DeciderOptions) -> Decider:
    """Draw among those that keep the targets, each equally likely."""
    draw = random.Random(options.seed)
    return lambda feasible, reading: draw.choice(feasible.decisions) if feasible.decisions else None


def dual_head(options: DeciderOptions) -> Decider:
    """Take what the compact model that read the prompt wants."""
    return lambda feasible, reading: None if reading is None else reading.wanted(feasible)


def best_of(feasible: Feasible) -> Decision | None:
    """Return the feasible decision of the largest shape by time per token, and of those that of the longest prompt.

    A shape is not taken for another one that has all its layers and channels, whatever measurements say of the two.
    """
    decisions, latencies = feasible.decisions, feasible.latencies

    def size(decision: Decision) -> tuple[float, Fraction]:
        return latencies[decision].tpot, decision.share

    best = max(decisions, key=size, default=None)
    while best is not None and (larger := [each for each in decisions if _has_more(each, best)]):
        best = max(larger, key=size)
    return best


def _has_more(one: Decision, other: Decision) -> bool:
    """Tell whether a decision has all layers, channels and tokens of another one, and more layers or channels."""
    a, b = one.shape, other.shape
    return a != b and a.depth >= b.depth and a.width >= b.width and one.share >= other.share


def decided(decider: Decider, feasible: Feasible, reading: Reading | None = None) -> Decision:
    """Return a decision that keeps the targets: the decider's, or where that does not, the largest that does.

    Raises:
        SloError: If none keeps them.
    """
    possible = feasible.require()
    wanted = decider(feasible, reading)
    if wanted is not None and (listed := feasible.listed(wanted)) in possible:
        return listed
    best = best_of(feasible)
    assert best is not None  # there is one that is possible
    return best
