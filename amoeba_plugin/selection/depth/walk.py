"""The steps at which subnets that lack some of them need states: what they share is visited once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from amoeba_plugin.selection.depth.steps import WHOLE, Removed


@dataclass(frozen=True)
class Visit:
    """What happens at one step, a layer or a sublayer: which states go through it, and which are led around it.

    A state is known by the steps removed before it; the empty set is the whole model's.
    """

    step: int
    through: tuple[Removed, ...]
    around: tuple[Removed, ...]
    fronts: frozenset[Removed] = frozenset()  # of those through, what is led around the next step in some set


def walk(sets: Sequence[Removed], num_steps: int) -> Iterator[Visit]:
    """Yield the steps at which subnets need states, first to last.

    Sets with the same steps removed so far share one state. As long as none is removed it is the whole model's, which
    is run only where the whole model is among the sets.

    >>> [len(visit.through) for visit in walk([frozenset({1}), frozenset({1, 3}), frozenset({2})], 5)]
    [0, 1, 2, 3]
    """
    for step in range(min(min(removed, default=0) for removed in sets), num_steps):
        so_far = {removed: Removed(index for index in removed if index < step) for removed in sets}
        known = set() if WHOLE in sets else {WHOLE}
        through = dict.fromkeys(so_far[removed] for removed in sets if step not in removed)
        around = dict.fromkeys(so_far[removed] for removed in sets if step in removed)
        fronts = {so_far[removed] for removed in sets if step not in removed and step + 1 in removed}
        yield Visit(step, tuple(state for state in through if state not in known), tuple(around), frozenset(fronts))
