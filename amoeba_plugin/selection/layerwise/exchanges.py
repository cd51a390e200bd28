"""Choices improved by measuring: scores only add up nearly, so the nearest exchanges are tried on calibration data.

Larger budgets take over what smaller ones found, so that none loses more: see :func:`climb`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from amoeba_plugin.selection.layerwise.allocation import SLACK, Allocation, Table, knapsack

Choice = tuple[int, ...]
Places = NDArray[np.intp]
Measure = Callable[[Choice], float]
BITS_STEP, SPARSITY_STEP = 0.25, 0.1  # between the budgets on the way to the one asked for


def climb(task: Allocation, measure: Measure, exchanges: int) -> tuple[Choice, float]:
    """Return the best choice within a budget that was measured, and what it loses.

    On the way to the budget stand all smaller multiples of a quarter of a bit (without a budget of bits: all larger
    multiples of a tenth of sparsity), each a budget of its own: its knapsack is solved and measured, the best of it and
    of the budgets before is improved by exchanges. So a budget of n quarters of a bit never loses more on this data
    than one of fewer.

    Args:
        task: With the budget.
        measure: What a choice loses; called once for every choice.
        exchanges: Tried at every budget on the way.
    """
    known: dict[Choice, float] = {}

    def measured(choice: Choice) -> float:
        if choice not in known:
            known[choice] = measure(choice)
        return known[choice]

    best: Choice | None = None
    for rung in rungs(task):
        found = tuple(knapsack(rung))
        if best is None or measured(found) < measured(best):
            best = found
        best = _improved(rung, best, measured, exchanges)
    assert best is not None
    return best, measured(best)


def rungs(task: Allocation) -> Iterator[Allocation]:
    """Yield the budgets on the way to that of a task, from the smallest that can be kept, the task's own at last."""
    asked, sparsity = task.average_bits, task.average_sparsity
    share = task.weights / task.weights.sum()
    if asked is not None:
        least = float(share @ task.bits.min(axis=1))
        first = math.ceil(least / BITS_STEP - SLACK)
        for step in range(first, math.ceil(asked / BITS_STEP - SLACK)):
            rung = task.at(step * BITS_STEP, sparsity)
            if _is_kept(rung):
                yield rung
    else:
        most = float(share @ task.sparsity.max(axis=1))
        for step in range(math.floor(most / SPARSITY_STEP + SLACK), math.floor(sparsity / SPARSITY_STEP + SLACK), -1):
            yield task.at(None, step * SPARSITY_STEP)
    yield task


def nearest(task: Allocation, chosen: Choice, most: int) -> list[Choice]:
    """Return the exchanges that keep the averages, those first whose scores promise most.

    An exchange gives one unit another option, or two units.

    Args:
        task: With the averages to keep.
        chosen: What is exchanged in.
        most: How many to return.
    """
    columns = np.array(chosen)
    rows = np.arange(len(columns))
    units, options = np.nonzero(np.arange(task.scores.shape[1])[None, :] != columns[:, None])
    share = task.weights / task.weights.sum()
    bits, sparsity = task.averages(chosen)

    def change(table: Table, weight: Table) -> Table:
        changed: Table = (table[units, options] - table[rows, columns][units]) * weight[units]
        return changed

    score = change(task.scores, np.ones(len(rows)))
    more_bits, more_zeros = change(task.bits, share), change(task.sparsity, share)
    # The last one changes nothing: with it, a pair is one unit's exchange.
    score, more_bits, more_zeros = (np.append(each, 0.0) for each in (score, more_bits, more_zeros))
    of_unit = np.append(units, -1)
    first, second = np.triu_indices(len(score), 1)
    kept = of_unit[first] != of_unit[second]
    kept &= bits + more_bits[first] + more_bits[second] <= (task.average_bits or np.inf) + SLACK
    kept &= sparsity + more_zeros[first] + more_zeros[second] >= task.average_sparsity - SLACK
    first, second = first[kept], second[kept]
    promised = np.argsort(score[first] + score[second], kind="stable")[:most]
    return [_exchanged(chosen, [first[each], second[each]], units, options) for each in promised]


def _improved(task: Allocation, chosen: Choice, measure: Measure, exchanges: int) -> Choice:
    tried: set[Choice] = {chosen}
    while len(tried) <= exchanges:
        new = next((each for each in nearest(task, chosen, exchanges + 1) if each not in tried), None)
        if new is None:
            break
        tried.add(new)
        if measure(new) < measure(chosen):
            chosen = new
    return chosen


def _exchanged(chosen: Choice, moves: Sequence[int], units: Places, options: Places) -> Choice:
    changed = list(chosen)
    for move in moves:
        if move < len(units):
            changed[units[move]] = int(options[move])
    return tuple(changed)


def _is_kept(task: Allocation) -> bool:
    """Tell whether some choice keeps both averages: bits and zeros are options of the same unit, and independent."""
    share = task.weights / task.weights.sum()
    sparse = float(share @ task.sparsity.max(axis=1)) >= task.average_sparsity - SLACK
    return sparse and float(share @ task.bits.min(axis=1)) <= (task.average_bits or np.inf) + SLACK
