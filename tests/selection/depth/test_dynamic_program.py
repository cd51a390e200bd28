"""The dynamic program on tables of scores, against a recursive reading of the recurrence and all sets."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.errors import DataError
from amoeba_plugin.selection.depth.dynamic_program import Search, Table, evaluations, exchange_evaluations
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, Objective, PerTokenLoss, Score
from support.deleted_layers import recurrence


def shrink(
    candidates: int, most: int, evaluate: Callable[[frozenset[int]], Score], objective: Objective, beam: int = 1
) -> Table:
    return Search(lambda sets: [evaluate(removed) for removed in sets], objective).shrink(candidates, most, beam)


def exchange(
    removed: frozenset[int],
    score: Score,
    candidates: int,
    evaluate: Callable[[frozenset[int]], Score],
    objective: Objective,
    rounds: int,
) -> tuple[frozenset[int], Score]:
    search = Search(lambda sets: [evaluate(each) for each in sets], objective)
    return search.exchange({len(removed): (removed, score)}, candidates, rounds)[len(removed)]


class Tabulated(Objective):
    """Scores drawn for each set of kept layers, without a look at the data."""

    name, unit, larger_is_better = "tabulated", "points", True

    def check(self, batches: Sequence[dict[str, Tensor]]) -> None:
        pass

    def measure(self, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> Score:
        raise NotImplementedError


@given(st.integers(1, 7), st.data(), st.integers(0, 10_000), st.booleans())
def test_the_program_is_the_recurrence_on_any_table(candidates: int, data: st.DataObject, seed: int, nan: bool) -> None:
    most = data.draw(st.integers(1, candidates))
    asked: list[frozenset[int]] = []
    values = [0.25, 0.5, 0.75, *([math.nan, math.inf] if nan else [])]  # few values: ties are common

    def evaluate(removed: frozenset[int]) -> Score:
        rng = random.Random(f"{seed} {sorted(removed)}")
        asked.append(removed)
        return Score(rng.choice(values), rng.choice([1.0, 2.0, 3.0, math.nan]))

    def scored(removed: frozenset[int]) -> tuple[float, float]:
        score = evaluate(removed)
        return tuple(x if math.isfinite(x) else math.inf for x in (-score.value, score.loss))

    try:
        table = shrink(candidates, most, evaluate, Tabulated())
    except DataError:
        return  # nothing finite, or all the same
    assert len(asked) == candidates * most - most * (most - 1) // 2
    wanted = recurrence(candidates, most, scored)
    assert {count: removed for count, (removed, _) in table.items()} == {
        m: removed for m, (removed, _) in wanted.items()
    }
    assert all(len(removed) == count for count, (removed, _) in table.items())


@given(st.integers(1, 7), st.data(), st.integers(0, 10_000))
def test_greedy_removal_takes_the_best_next_layer(candidates: int, data: st.DataObject, seed: int) -> None:
    most = data.draw(st.integers(1, candidates))
    asked: list[frozenset[int]] = []

    def evaluate(removed: frozenset[int]) -> Score:
        asked.append(removed)
        return Score(random.Random(f"{seed} {sorted(removed)}").random(), 0.0)

    search = Search(lambda sets: [evaluate(removed) for removed in sets], PerTokenLoss())
    table = search.remove_one_by_one(candidates, most)
    assert len(asked) == 1 + evaluations(candidates, most)
    removed: frozenset[int] = frozenset()
    for count in range(1, most + 1):
        removed = min(
            (removed | {layer} for layer in set(range(candidates)) - removed), key=lambda s: evaluate(s).value
        )
        assert table[count] == (removed, evaluate(removed))
    others = [frozenset(random.Random(f"{seed} {count}").sample(range(candidates), count)) for count in table]
    best = search.best_of(table, others)
    for other in others:
        assert best[len(other)][1].value == min(table[len(other)][1].value, evaluate(other).value)


@given(st.integers(1, 8), st.data(), st.integers(0, 10_000))
def test_lazy_removal_is_greedy_where_layers_do_not_get_cheaper(
    candidates: int, data: st.DataObject, seed: int
) -> None:
    """Losses of layers alone, and of pairs and triples of them, none below 0."""
    most, draw = data.draw(st.integers(1, candidates)), random.Random(seed)
    groups = [set(draw.sample(range(candidates), min(size, candidates))) for size in (1, 1, 1, 2, 2, 2, 3) * 2]
    costs = [(draw.random(), group) for group in groups] + [(draw.random(), {layer}) for layer in range(candidates)]
    asked: list[frozenset[int]] = []

    def evaluate(removed: frozenset[int]) -> Score:
        asked.append(removed)
        return Score(3 + sum(cost for cost, group in costs if group <= removed), 0.0)

    search = Search(lambda sets: [evaluate(removed) for removed in sets], PerTokenLoss())
    table = search.remove_one_by_one(candidates, most, 4)
    assert len(asked) == len(set(asked)) <= 1 + evaluations(candidates, most)
    assert table == search.remove_one_by_one(candidates, most)


def test_lazy_removal_measures_little_where_layers_do_not_matter_to_each_other() -> None:
    asked: list[frozenset[int]] = []
    search = Search(lambda sets: [asked.append(each) or Score(1 + sum(each), 0.0) for each in sets], PerTokenLoss())
    table = search.remove_one_by_one(30, 10, 4)
    assert table[10][0] == frozenset(range(10))
    assert len(asked) == 1 + 30 + 9 * 4


@pytest.mark.parametrize(
    ("candidates", "most", "expected"), [(31, 12, 306), (31, 16, 376), (32, 16, 392), (32, 12, 318)]
)
def test_the_paper_s_settings_take_the_evaluations_it_counts(candidates: int, most: int, expected: int) -> None:
    asked = []
    shrink(candidates, most, lambda removed: asked.append(removed) or Score(float(sum(removed)), 0.0), Tabulated())
    assert len(asked) == evaluations(candidates, most) == expected


@given(st.integers(1, 7), st.data(), st.integers(0, 10_000))
def test_a_beam_as_wide_as_the_table_finds_the_best_of_all_sets(
    candidates: int, data: st.DataObject, seed: int
) -> None:
    most = data.draw(st.integers(1, candidates))
    asked: list[frozenset[int]] = []

    def evaluate(removed: frozenset[int]) -> Score:
        asked.append(removed)
        return Score(random.Random(f"{seed} {sorted(removed)}").random(), 0.0)

    wide = math.comb(candidates, candidates // 2)
    found = shrink(candidates, most, evaluate, Tabulated(), beam=wide)
    assert len(asked) == len(set(asked)) == evaluations(candidates, most, wide)
    for count, (removed, score) in found.items():
        sets = [frozenset(each) for each in itertools.combinations(range(candidates), count)]
        assert removed == max(sets, key=lambda each: evaluate(each).value)
        assert score == evaluate(removed)


@given(st.integers(2, 7), st.data(), st.integers(0, 10_000))
def test_exchanges_end_where_no_single_one_is_better(candidates: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, candidates - 1))

    def evaluate(removed: frozenset[int]) -> Score:
        return Score(random.Random(f"{seed} {sorted(removed)}").random(), 0.0)

    start = frozenset(range(count))
    once, score = exchange(start, evaluate(start), candidates, evaluate, Tabulated(), rounds=1)
    neighbours = [frozenset(each) for each in itertools.combinations(range(candidates), count)]
    assert once == max((each for each in neighbours if len(each - start) <= 1), key=lambda each: evaluate(each).value)
    assert score == evaluate(once)
    last, score = exchange(start, evaluate(start), candidates, evaluate, Tabulated(), rounds=1000)
    assert len(last) == count
    assert all(evaluate(each).value <= score.value for each in neighbours if len(each - last) <= 1)


def test_exchanges_ask_for_every_neighbour_of_every_set_at_once() -> None:
    calls: list[int] = []

    def evaluate(sets: Sequence[frozenset[int]]) -> list[Score]:
        calls.append(len(sets))
        return [Score(-float(sum(removed)), 0.0) for removed in sets]  # the first layers go

    search = Search(evaluate, Tabulated())
    table = search.shrink(6, 3)
    assert calls == [1, 2, 3, 3, 3, 3]
    start = {count: (frozenset(range(6 - count, 6)), Score(-99.0, 0.0)) for count in table}
    assert {count: removed for count, (removed, _) in search.exchange(start, 6, rounds=9).items()} == {
        1: {0}, 2: {0, 1}, 3: {0, 1, 2},
    }  # fmt: skip
    assert calls[6] == exchange_evaluations(6, 3, rounds=1) == 5 + 8 + 9


@pytest.mark.parametrize(
    ("scores", "near"),
    [
        ((Score(1.0, 1.0), Score(1.0 + 2e-6, 1.0)), True),
        ((Score(1.0, 1.0), Score(1.0 + 2e-5, 1.0)), False),
        ((Score(0.5, 1.0), Score(0.5, 2.0)), False),  # questions answered right: the loss decides, and clearly
        ((Score(0.5, 1.0), Score(0.5, 1.0 + 2e-6)), True),
        ((Score(math.nan, 1.0), Score(math.nan, 1.0)), False),
    ],
)
def test_comparisons_within_rounding_are_remembered(scores: tuple[Score, Score], near: bool) -> None:
    search = Search(lambda sets: [scores[min(removed)] for removed in sets], PerTokenLoss())
    if math.isfinite(scores[0].value):
        kept = search.shrink(2, 1)[1][0]
        assert kept == {0}
    else:
        search._prefers(frozenset({0}), scores[0], frozenset({1}), scores[1])
    assert [(tie.preferred, tie.other) for tie in search.near_ties] == [({0}, {1})] * near


def test_a_beam_of_one_is_the_default() -> None:
    assert evaluations(31, 12) == evaluations(31, 12, beam=1) == 306


def test_ties_of_accuracy_are_broken_by_loss() -> None:
    losses = {frozenset({1}): 3.0, frozenset({0}): 2.0}
    table = shrink(2, 1, lambda removed: Score(0.5, losses[removed]), MultipleChoiceAccuracy())
    assert table[1] == (frozenset({0}), Score(0.5, 2.0))
