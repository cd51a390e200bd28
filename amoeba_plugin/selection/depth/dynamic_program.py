"""Which sets of layers to score and to keep: the paper's dynamic program, greedy removal, exchanges. No model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from amoeba_plugin.errors import DataError
from amoeba_plugin.selection.depth.steps import Removed
from amoeba_plugin.selection.objectives import Objective, Score, badness, better

AT_ONCE = 4  # layers that lazy removal measures together: what their subnets share is computed once
NEAR = 1e-5  # relative; how far fp32 may round differently where states are batched differently

Table = dict[int, tuple[Removed, Score]]  # by number of layers removed


@dataclass(frozen=True)
class NearTie:
    """Two sets whose scores differ by less than rounding may: the same search elsewhere may prefer the other."""

    preferred: Removed
    other: Removed


@dataclass
class Search:
    """Scores sets of layers a step at a time, and remembers what a user should hear of.

    Attributes:
        evaluate: Scores the model without each of some sets of layers.
        objective: Says which score is better.
        near_ties: Found so far, in the order of the search.
    """

    evaluate: Callable[[Sequence[Removed]], Sequence[Score]]
    objective: Objective
    near_ties: list[NearTie] = field(default_factory=list)

    def shrink(self, candidates: int, most: int, beam: int = 1) -> Table:
        """Run the dynamic program over layers ``candidates - 1`` to 0 (AmoebaLLM, arXiv:2411.10606, section 4.1).

        State (n, m): of the first n layers visited m are removed, all others are active. Keeping a layer costs nothing,
        removing it costs one evaluation of each set kept in the state before. All evaluations of step n are asked for
        at once: every layer before the visited one is intact in all of them.

        Args:
            candidates: N, layers that may go: indices 0 to N - 1.
            most: M, the most layers to remove.
            beam: Sets kept per state; 1 is the paper.

        Returns:
            For m from 1 to M the removed layers and their score.

        Raises:
            DataError: If no score is finite, or all are the same.
        """
        best: dict[int, list[tuple[Removed, Score]]] = {}  # by count, best first
        seen: list[Score] = []
        for visited in range(1, candidates + 1):
            layer = candidates - visited  # from the last candidate towards layer 0
            before = {0: [Removed()]} | {count: [removed for removed, _ in kept] for count, kept in best.items()}
            # S[n,m] = S[n-1,m-1] + {n-th layer} where that is strictly better than S[n-1,m], else S[n-1,m]
            step = [earlier | {layer} for count in range(1, min(visited, most) + 1) for earlier in before[count - 1]]
            for removed, score in zip(step, self.evaluate(step), strict=True):
                seen.append(score)
                self._insert(best.setdefault(len(removed), []), removed, score, beam)
        self._require_telling(seen)
        return {count: kept[0] for count, kept in best.items()}

    def remove_one_by_one(self, candidates: int, most: int, at_once: int | None = None) -> Table:
        """Remove, again and again, the layer without which the rest is best (SLEB, arXiv:2402.09025): nested sets.

        Args:
            candidates: N, layers that may go: indices 0 to N - 1.
            most: M, the most layers to remove.
            at_once: ``None``: all layers left are measured in every round. Else so many together, in the order of what
                each cost when last measured; a round is over when one measured in it costs less than all others did
                before. That is right where layers do not get cheaper as others go (Minoux 1978, accelerated greedy).

        Returns:
            For m from 1 to M the removed layers and their score.

        Raises:
            DataError: If no score is finite, or all are the same.
        """
        table: Table = {}
        seen: list[Score] = []
        removed, before = Removed(), badness(self.objective, self.evaluate([Removed()])[0])
        cost: dict[int, tuple[float, ...]] = dict.fromkeys(range(candidates), ())  # when last measured
        for count in range(1, most + 1):
            some_only = candidates if at_once is None or not table else at_once
            known: dict[int, Score] = {}
            while (cheapest := sorted(cost, key=cost.__getitem__))[0] not in known:
                some = sorted([layer for layer in cheapest if layer not in known][:some_only])
                for layer, score in zip(some, self.evaluate([removed | {layer} for layer in some]), strict=True):
                    known[layer] = score
                    cost[layer] = _growth(before, badness(self.objective, score))
            seen += known.values()
            kept: list[tuple[Removed, Score]] = []
            for layer in sorted(known):
                self._insert(kept, removed | {layer}, known[layer], 1)
            table[count] = kept[0]
            (gone,) = kept[0][0] - removed
            removed, before = kept[0][0], badness(self.objective, kept[0][1])
            del cost[gone]
        self._require_telling(seen)
        return table

    def best_of(self, table: Table, others: Sequence[Removed]) -> Table:
        """Return for every number of layers removed the best of a table's set and other sets of as many."""
        for removed, score in zip(others, self.evaluate(others) if others else [], strict=True):
            if self._prefers(removed, score, *table[len(removed)]):
                table = table | {len(removed): (removed, score)}
        return table

    def exchange(self, table: Table, candidates: int, rounds: int) -> Table:
        """Improve every removal set by exchanging single layers; ends where no exchange is strictly better.

        Args:
            table: The sets to begin with, and their scores.
            candidates: N, layers that may go: indices 0 to N - 1.
            rounds: Most exchanges; each costs |removed| * (N - |removed|) evaluations of every set not yet at its best.
        """
        improving = set(table)
        for _ in range(rounds):
            near = {count: _neighbours(table[count][0], candidates) for count in improving}
            asked = [removed for count in sorted(near) for removed in near[count]]
            if not asked:
                break
            scores = dict(zip(asked, self.evaluate(asked), strict=True))
            improving = set()
            for count in sorted(near):
                for removed in near[count]:
                    if self._prefers(removed, scores[removed], *table[count]):
                        table = table | {count: (removed, scores[removed])}
                        improving.add(count)
        return table

    def _insert(self, kept: list[tuple[Removed, Score]], removed: Removed, score: Score, beam: int) -> None:
        """Put a set where its score belongs, behind those it is not strictly better than; forget what falls off."""
        preferred = [self._prefers(removed, score, *other) for other in kept]
        kept.insert(preferred.index(True) if any(preferred) else len(kept), (removed, score))
        del kept[beam:]

    def _prefers(self, removed: Removed, score: Score, other: Removed, other_score: Score) -> bool:
        preferred = better(self.objective, score, other_score)
        if _near(score, other_score) and removed != other:
            self.near_ties.append(NearTie(*((removed, other) if preferred else (other, removed))))
        return preferred

    def _require_telling(self, seen: Sequence[Score]) -> None:
        if not any(math.isfinite(score.value) for score in seen):
            raise DataError(
                f"{self.objective.name} is NaN or infinite without any of the layers; check weights, dtype and "
                "calibration data"
            )
        if len(seen) > 1 and len(set(seen)) == 1:
            raise DataError(
                f"{self.objective.name} is {seen[0].value} for all {len(seen)} candidates: it cannot tell layers "
                "apart; give more or other calibration data, or another objective"
            )


def evaluations(candidates: int, most: int, beam: int = 1) -> int:
    """Return how many subnets the dynamic program scores.

    >>> evaluations(31, 12), evaluations(31, 12, beam=4)
    (306, 1094)
    """
    # state (n-1, m-1) holds min(b, number of ways to choose m-1 of n-1 layers) sets, and each is extended by layer n
    return sum(
        min(beam, math.comb(visited - 1, count - 1))
        for visited in range(1, candidates + 1)
        for count in range(1, min(visited, most) + 1)
    )


def exchange_evaluations(candidates: int, most: int, rounds: int) -> int:
    """Return how many subnets the exchanges score at most, for every number of layers removed from 1 to ``most``.

    >>> exchange_evaluations(11, 4, 1)
    80
    """
    return rounds * sum(count * (candidates - count) for count in range(1, most + 1))


def _growth(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, ...]:
    return tuple(now - then if math.isfinite(now) else math.inf for then, now in zip(before, after, strict=True))


def _neighbours(removed: Removed, candidates: int) -> list[Removed]:
    kept = sorted(set(range(candidates)) - removed)
    return [removed - {back} | {gone} for back, gone in itertools.product(sorted(removed), kept)]


def _near(a: Score, b: Score) -> bool:
    """Tell whether rounding could turn the comparison; equal values are decided by the loss."""
    if a.value != b.value:
        return math.isclose(a.value, b.value, rel_tol=NEAR)
    return math.isclose(a.loss, b.loss, rel_tol=NEAR)
