"""Windows: the contiguous layers below an exit that one step trains, and which exit each step draws. No torch.

(Edge-LLM, arXiv:2406.15758; its released code trains the exits one after the other, ``sequential`` here.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from amoeba_plugin.errors import RecipeError


@dataclass(frozen=True)
class Window:
    """Layers ``first`` to ``depth - 1``, trained by the loss of the exit behind them.

    >>> 2 in Window(4, 2), 4 in Window(4, 2)
    (True, False)
    """

    depth: int
    first: int

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer < self.depth


def windows_below(depths: Sequence[int], size: int | None = None, apart: bool = False) -> tuple[Window, ...]:
    """Return the window of every exit.

    Args:
        depths: Of the exits, ascending.
        size: Layers of a window; ``None``: down to the exit below, so that every layer is in one.
        apart: No window reaches below that exit.

    >>> [(each.first, each.depth) for each in windows_below([2, 6])], windows_below([6], 9)
    ([(0, 2), (2, 6)], (Window(depth=6, first=0),))
    """
    return tuple(
        Window(depth, below if size is None else max(below if apart else 0, depth - size))
        for below, depth in pairwise((0, *depths))
    )


#: Policy: the exit's number, given the phase, how many phases and exits there are, their weights and the seed.
Policy = Callable[[int, int, Sequence[float], int], int]


def _random(phase: int, phases: int, weights: Sequence[float], seed: int) -> int:
    """Draw one by its weight."""
    return random.Random(f"{seed}/{phase}").choices(range(len(weights)), weights)[0]  # a new one per phase


def _cyclic(phase: int, phases: int, weights: Sequence[float], seed: int) -> int:
    """Take one after the other, from below, again and again."""
    return phase % len(weights)


def _sequential(phase: int, phases: int, weights: Sequence[float], seed: int) -> int:
    """Take one after the other, from below, once, each for its share of the training."""
    reached, total = (phase + 0.5) / phases * sum(weights), 0.0
    for number, weight in enumerate(weights):
        total += weight
        if reached < total:
            return number
    return len(weights) - 1


POLICIES: Mapping[str, Policy] = {"random": _random, "cyclic": _cyclic, "sequential": _sequential}


def require_policy(policy: str, phase_steps: int) -> None:
    """Refuse a policy that does not exist, or phases of no step.

    Raises:
        RecipeError: It says what is possible.
    """
    if policy not in POLICIES:
        raise RecipeError(f"policy '{policy}' of exits is unknown; choose one of {', '.join(POLICIES)}")
    if phase_steps < 1:
        raise RecipeError(f"phase_steps {phase_steps}: give 1 optimizer step or more")


def require_weights(weights: Sequence[float], exits: int) -> None:
    """Refuse weights that are not one above 0 for every exit; none at all are all alike.

    Raises:
        RecipeError: It names both numbers.
    """
    if weights and (len(weights) != exits or min(weights) <= 0):
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise RecipeError(f"weights {given} of {exits} exits: give one number above 0 for each, or none")


@dataclass(frozen=True)
class Schedule:
    """Says which window a step trains, from the seed and the step alone: resuming draws the same.

    Attributes:
        windows: Of the exits, from below.
        policy: One of :data:`POLICIES`.
        weights: How often, or for which share of the steps, each exit is trained; empty: all alike.
        phase_steps: Steps between two draws.
        max_steps: Of the training.
        seed: Of the draws.
    """

    windows: tuple[Window, ...]
    policy: str = "random"
    weights: tuple[float, ...] = ()
    phase_steps: int = 1
    max_steps: int = 1
    seed: int = 0

    def at(self, step: int) -> Window:
        """Return the window that an optimizer step trains; the first one is step 0."""
        phases = max(1, -(-self.max_steps // self.phase_steps))
        weights = self.weights or (1.0,) * len(self.windows)
        return self.windows[POLICIES[self.policy](step // self.phase_steps, phases, weights, self.seed)]
