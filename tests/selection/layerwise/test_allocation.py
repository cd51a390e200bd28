"""The knapsack against all choices there are, the paper's rules by hand, budgets that climb."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoeba_plugin.errors import BudgetError
from amoeba_plugin.selection.layerwise.allocation import Allocation, knapsack, sparsity_by_mean, twice_above_mean
from amoeba_plugin.selection.layerwise.exchanges import climb, nearest, rungs

BITS = (4.25, 8.25, 16.0)
ZEROS = (0.0, 0.25, 0.5)


def random_task(seed: int, units: int = 4, bits: float | None = 7.0, sparsity: float = 0.2) -> Allocation:
    """Every bits with every sparsity, of units of different sizes; scores that no rule made."""
    rng = np.random.default_rng(seed)
    options = list(itertools.product(BITS, ZEROS))
    return Allocation(
        rng.integers(1, 20, units).astype(float),
        rng.random((units, len(options))),
        np.array([[bit for bit, _ in options]] * units),
        np.array([[zero for _, zero in options]] * units),
        bits,
        sparsity,
    )


def by_trying_all(task: Allocation) -> float:
    """The least score of all choices within the averages, in plain loops."""
    best, total = float("inf"), sum(task.weights)
    for choice in itertools.product(range(task.scores.shape[1]), repeat=len(task.weights)):
        bits = sum(w * task.bits[u][o] for u, (w, o) in enumerate(zip(task.weights, choice, strict=True))) / total
        zeros = sum(w * task.sparsity[u][o] for u, (w, o) in enumerate(zip(task.weights, choice, strict=True))) / total
        if (task.average_bits is None or bits <= task.average_bits) and zeros >= task.average_sparsity:
            best = min(best, sum(task.scores[u][o] for u, o in enumerate(choice)))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("bits", "sparsity"), [(7.0, 0.2), (5.0, 0.45), (12.0, 0.0), (None, 0.3)])
def test_the_knapsack_finds_what_trying_all_choices_finds(seed: int, bits: float | None, sparsity: float):
    task = random_task(seed, bits=bits, sparsity=sparsity)
    found = knapsack(task)
    assert task.keeps(found)
    assert task.score(found) == pytest.approx(by_trying_all(task), abs=1e-9)


def test_averages_are_weighted_by_the_sizes_of_units():
    task = random_task(0)
    choice = [0, 4, 8, 2]
    share = task.weights / task.weights.sum()
    expected = sum(share[unit] * task.bits[unit, option] for unit, option in enumerate(choice))
    assert task.averages(choice)[0] == pytest.approx(expected)
    assert not task.at(expected - 0.01, 0.0).keeps(choice)
    assert task.at(expected, 0.0).keeps(choice)


@pytest.mark.parametrize("asked", [4.0, 16.0, 20.0])
def test_bits_out_of_reach_are_refused_with_what_is_possible(asked: float):
    with pytest.raises(BudgetError, match=r"from 4\.25 to below 16"):
        knapsack(random_task(0, bits=asked, sparsity=0.0))


def test_too_few_bits_are_answered_with_the_nearest():
    with pytest.raises(BudgetError, match=r"the nearest is 4\.25$"):
        random_task(0, bits=4.0, sparsity=0.0).require_reachable()
    random_task(0, bits=4.25, sparsity=0.0).require_reachable()


def test_too_many_zeros_are_answered_with_the_nearest():
    with pytest.raises(BudgetError, match=r"the nearest is 0\.5$"):
        knapsack(random_task(0, sparsity=0.6))


def test_units_above_the_mean_get_twice_the_bits():
    assert twice_above_mean([1.0, 1.0, 10.0, 4.0]) == [False, False, True, False]  # their mean is 4


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1000)), min_size=1, max_size=12), st.floats(0, 0.7))
@settings(max_examples=200, deadline=None)
def test_sparsity_by_the_mean_keeps_its_average_and_its_limit(units: list[tuple[float, int]], average: float):
    scores, weights = zip(*units, strict=True)
    found = sparsity_by_mean(scores, weights, average, 0.7)
    assert sum(w * s for w, s in zip(weights, found, strict=True)) / sum(weights) == pytest.approx(average, abs=1e-6)
    assert all(-1e-9 <= each <= 0.7 + 1e-9 for each in found)
    for (first, one), (second, other) in itertools.combinations(zip(scores, found, strict=True), 2):
        if first < second:
            assert one >= other - 1e-9


def test_sparsity_by_the_mean_is_the_papers_formula_where_nothing_is_cut_off():
    scores = [0.0, 0.5, 1.0, 0.25]
    scaled = [1 - each for each in scores]
    expected = [0.3 * 4 * each / sum(scaled) for each in scaled]
    assert sparsity_by_mean(scores, [5, 5, 5, 5], 0.3, 0.7) == pytest.approx(expected)


# --- measured exchanges


def test_the_nearest_exchange_is_the_best_of_all_that_change_two_units():
    task = random_task(3)
    chosen = tuple(knapsack(task))
    options = range(task.scores.shape[1])
    others = [
        choice
        for choice in itertools.product(options, repeat=4)
        if 1 <= sum(a != b for a, b in zip(choice, chosen, strict=True)) <= 2 and task.keeps(choice)
    ]
    found = nearest(task, chosen, 10)
    assert [task.score(each) for each in found] == pytest.approx(sorted(task.score(each) for each in others)[:10])
    assert set(found) <= set(others)


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_budget_never_loses_more(seed: int):
    """By a loss that is no sum of scores, so that the knapsack alone would break it: at some seed it does."""
    task = random_task(seed, units=6)
    rng = np.random.default_rng(seed + 100)
    disturbed = task.scores + rng.normal(0, 0.3, task.scores.shape)

    def measure(choice: tuple[int, ...]) -> float:
        return float(disturbed[np.arange(6), list(choice)].sum())

    budgets = [4.5, 5.0, 5.25, 6.0, 7.5, 9.0, 12.0]
    lost = [climb(task.at(bits, 0.1), measure, 3)[1] for bits in budgets]
    assert lost == sorted(lost, reverse=True)


def test_without_climbing_larger_budgets_would_lose_more_at_times():
    """What the test above would miss if its loss were a sum of scores."""
    worse = 0
    for seed in range(5):
        task = random_task(seed, units=6)
        disturbed = task.scores + np.random.default_rng(seed + 100).normal(0, 0.3, task.scores.shape)
        lost = [
            disturbed[np.arange(6), knapsack(task.at(bits, 0.1))].sum()
            for bits in (4.5, 5.0, 5.25, 6.0, 7.5, 9.0, 12.0)
        ]
        worse += sum(after > before for before, after in itertools.pairwise(lost))
    assert worse > 0


def test_every_choice_is_measured_once_and_keeps_the_averages():
    task, seen = random_task(1, units=5), []
    best, lost = climb(task, lambda choice: seen.append(choice) or task.score(choice), 5)
    assert len(seen) == len(set(seen))
    assert all(task.keeps(choice) for choice in seen)
    assert lost == pytest.approx(by_trying_all(task), abs=1e-9)
    assert task.score(best) == lost


def test_budgets_on_the_way_are_quarters_of_a_bit():
    assert [rung.average_bits for rung in rungs(random_task(0, bits=5.1))] == [4.25, 4.5, 4.75, 5.0, 5.1]
    assert [rung.average_bits for rung in rungs(random_task(0, bits=4.25))] == [4.25]
    without_bits = rungs(random_task(0, bits=None, sparsity=0.25))
    assert [rung.average_sparsity for rung in without_bits] == pytest.approx([0.5, 0.4, 0.3, 0.25])
