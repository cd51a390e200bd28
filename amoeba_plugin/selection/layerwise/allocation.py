"""Which option every unit gets, of scores that add up: a multiple-choice knapsack, and the paper's rule of the mean.

Pure functions of numbers. A row of a table is a unit, a column an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix

from amoeba_plugin.errors import BudgetError

Table = NDArray[np.float64]
SLACK = 1e-9  # of averages, for sums that round
GAP = 1e-6  # relative, at which the solver stops


@dataclass(frozen=True)
class Allocation:
    """What is to be allocated.

    Attributes:
        weights: Of every unit how many it has, (units,).
        scores: What every unit loses by every option, (units, options), in any unit; losses are taken to add up.
        bits: Counted bits per weight, (units, options).
        sparsity: Counted shares of zeros, (units, options).
        average_bits: The most, on average over weights; ``None``: any.
        average_sparsity: The least, on average over weights.
    """

    weights: Table
    scores: Table
    bits: Table
    sparsity: Table
    average_bits: float | None = None
    average_sparsity: float = 0.0

    def averages(self, chosen: Sequence[int]) -> tuple[float, float]:
        """Return the average bits and the average sparsity of a choice of one option per unit."""
        rows = np.arange(len(self.weights))
        share = self.weights / self.weights.sum()
        columns = list(chosen)
        return float(share @ self.bits[rows, columns]), float(share @ self.sparsity[rows, columns])

    def score(self, chosen: Sequence[int]) -> float:
        """Return the sum of the scores of a choice."""
        return float(self.scores[np.arange(len(self.weights)), list(chosen)].sum())

    def keeps(self, chosen: Sequence[int]) -> bool:
        """Tell whether a choice is within both averages."""
        bits, sparsity = self.averages(chosen)
        return bits <= (self.average_bits or np.inf) + SLACK and sparsity >= self.average_sparsity - SLACK

    def at(self, average_bits: float | None, average_sparsity: float) -> Allocation:
        """Return the same for other averages."""
        return replace(self, average_bits=average_bits, average_sparsity=average_sparsity)

    def require_reachable(self) -> None:
        """Refuse averages that no choice keeps.

        Raises:
            BudgetError: With the nearest that there is.
        """
        share = self.weights / self.weights.sum()
        least, most = float(share @ self.bits.min(axis=1)), float(share @ self.bits.max(axis=1))
        asked = self.average_bits
        if asked is not None and not least - SLACK <= asked < most:
            possible = f"from {least:.4g}" + (f" to below {most:.4g}" if most > least else "")
            near = f"the nearest is {least:.4g}" if asked < least else "ask for less, or leave it out"
            raise BudgetError(
                f"average bits {asked:g} are out of reach: with scales{' and zero points' * _odd(least)} counted, the "
                f"options give {possible} bits per weight; {near}"
            )
        sparsest = float(share @ self.sparsity.max(axis=1))
        if self.average_sparsity > sparsest + SLACK:
            raise BudgetError(
                f"average sparsity {self.average_sparsity:g} is out of reach: the options give at most {sparsest:.4g} "
                f"of whole weights per row; the nearest is {_down(sparsest)}"
            )


def knapsack(task: Allocation) -> list[int]:
    """Return the options of least total score within both averages, one for every unit.

    Solved by HiGHS as an integer program, to a relative gap of a millionth.

    Raises:
        BudgetError: If the averages are out of reach.
    """
    task.require_reachable()
    units, options = task.scores.shape
    share = task.weights / task.weights.sum()
    one_each = csr_matrix(block_diag([np.ones((1, options))] * units))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if task.average_bits is not None:
        constraints.append(LinearConstraint((share[:, None] * task.bits).reshape(1, -1), ub=task.average_bits + SLACK))
    if task.average_sparsity > 0:
        zeros = (share[:, None] * task.sparsity).reshape(1, -1)
        constraints.append(LinearConstraint(zeros, lb=task.average_sparsity - SLACK))
    scale = max(float(np.abs(task.scores).max()), np.finfo(float).tiny)
    found = milp(
        task.scores.flatten() / scale,
        integrality=np.ones(units * options),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise BudgetError(
            f"no choice of options keeps average bits {task.average_bits} and average sparsity {task.average_sparsity} "
            "together; allow more bits, less sparsity, or more options"
        )
    chosen: list[int] = found.x.reshape(units, options).argmax(axis=1).tolist()
    return chosen


def twice_above_mean(scores: Sequence[float]) -> list[bool]:
    """Return which units get twice the base bits by the paper's rule: those more sensitive than the mean.

    Args:
        scores: What every unit loses at the base bits.

    >>> twice_above_mean([1.0, 2.0, 6.0])
    [False, False, True]
    """
    mean = sum(scores) / len(scores)
    return [score > mean for score in scores]


def sparsity_by_mean(scores: Sequence[float], weights: Sequence[float], average: float, most: float) -> list[float]:
    """Return a sparsity for every unit, less for more sensitive ones, by the paper's rule, whose mean is kept exactly.

    In proportion to ``1 - s``, where ``s`` are the scores scaled to [0, 1]; unlike the released code's, no sparsity
    exceeds ``most``: what is cut off there, the others take.

    Args:
        scores: What every unit loses by zeros.
        weights: Of every unit.
        average: Over all weights, from 0 to ``most``.
        most: Of a unit.

    >>> sparsity_by_mean([0.0, 1.0, 2.0], [1, 1, 1], 0.3, 0.7)
    [0.6, 0.3, 0.0]
    """
    low, spread = min(scores), max(scores) - min(scores)
    wish = np.array([1 - (score - low) / spread if spread else 1.0 for score in scores])
    share = np.array(weights, dtype=float) / sum(weights)
    found, free = np.zeros(len(wish)), np.ones(len(wish), dtype=bool)
    while True:
        left = average - float(share[~free] @ found[~free])
        offered = float(share[free] @ wish[free])
        if offered <= SLACK:  # only units that want none are left: they share what is left alike
            found[free] = left / float(share[free].sum()) if free.any() else 0.0
            break
        found[free] = left * wish[free] / offered
        over = free & (found > most + SLACK)
        if not over.any():
            break
        found[over], free = most, free & ~over
    return [round(float(each), 12) for each in found]


def _odd(least: float) -> bool:
    return least != int(least)


def _down(share: float) -> str:
    """Return a share in words, rounded down, so that it can be asked for."""
    return f"{int(share * 1000) / 1000:g}"
