"""The last round against all there is to know: the best of all once every scheme's harm is known, or what is open."""

from __future__ import annotations

import pytest

from amoeba_plugin.deployment.search.exhaustive import exhaustive
from amoeba_plugin.deployment.search.finalists import measure_schemes, settle
from amoeba_plugin.deployment.search.hierarchical import hierarchical
from amoeba_plugin.deployment.search.problem import AT_ONCE
from amoeba_plugin.shape import SubnetShape
from support.landscapes import landscape


@pytest.mark.parametrize("surprise", [0.0, 0.3])
@pytest.mark.parametrize("schemes", ["F16,Q8_0,Q4_0", "Q4_0", "F16"])
def test_the_best_of_all_choices_is_found_once_enough_are_measured(schemes: str, surprise: float):
    for seed in range(30):
        problem, true = landscape(seed, schemes, surprise)
        measure_schemes(problem)
        exhaustive(problem)
        settled = settle(problem, 1000)
        while settled.refused:  # what is known to exceed is not tried again
            exhaustive(problem)
            settled = settle(problem, 1000)
        assert settled.finalists[0] == min(true, key=lambda each: true[each])
        assert settled.open == 0
        assert all(problem.loss(each) == pytest.approx(true[each]) for each in settled.finalists)


def test_few_measurements_and_what_they_leave_open():
    measured = []
    for seed in range(30):
        problem, true = landscape(seed, "Q4_0")
        exhaustive(problem)
        settled = settle(problem, 3)
        assert len(problem.harms) <= 3
        chosen = settled.finalists[0]
        assert true[chosen] == min(true[each] for each in problem.harms)
        left = [each for each in true if each not in problem.harms]
        assert settled.open == sum(problem.unharmed(each.shape).value < true[chosen] for each in left)
        measured.append(len(problem.harms))
    assert min(measured) >= 1


def test_a_scheme_that_harms_little_needs_few():
    for seed in range(30):
        problem, true = landscape(seed, "Q8_0")
        exhaustive(problem)
        settled = settle(problem, 100)
        assert len(problem.harms) < 0.5 * len(true)
        assert settled.open == 0


def test_both_searchers_search_every_scheme():
    near = []
    for seed in range(40):
        (every, true), (few, _) = landscape(seed), landscape(seed)
        for problem, search in ((every, exhaustive), (few, hierarchical)):
            measure_schemes(problem)
            search(problem)
        best, found = settle(every, 100).finalists[0], settle(few, 100).finalists[0]
        near.append(true[found] - true[best] < 0.05)
        assert len(few.qualities) < len(every.qualities)
    assert sum(near) >= 0.9 * len(near)


def test_harm_is_not_looked_for_where_there_is_none():
    problem, _ = landscape(1, "F16")
    problem.harm = lambda choice: pytest.fail(f"{choice} is exact")
    measure_schemes(problem)
    exhaustive(problem)
    settle(problem, 5)
    assert problem.harms == {}


def test_what_is_chosen_was_measured_and_keeps_the_budget():
    for seed in range(30):
        problem, _ = landscape(seed, surprise=0.2)
        measure_schemes(problem)
        exhaustive(problem)
        for choice in settle(problem, 4).finalists:
            (cost,) = problem.costs(choice).values()
            assert cost.measured
            assert cost.value <= problem.budget.limits[0].most


def test_the_harm_of_another_shape_stands_in_for_one_that_was_not_measured():
    problem, _ = landscape(2, "Q4_0")
    first, second = problem.possible()[:2]
    before = problem.loss(second)
    problem.measure_harm(first)
    assert problem.loss(second) == pytest.approx(before + problem.harms[first].value)
    assert isinstance(second.shape, SubnetShape)
    assert not problem.is_final(second)


def test_choices_that_must_be_run_are_run_together():
    for seed in range(20):
        (problem, _), (alone, _) = landscape(seed, surprise=0.2), landscape(seed, surprise=0.2)
        asked, before = [], problem.measure
        problem.measure = lambda choices, asked=asked, before=before: asked.append(list(choices)) or before(choices)
        measure = alone.measure
        alone.measure = lambda choices, measure=measure: {each: measure([each])[each] for each in choices[:1]}
        for each in (problem, alone):
            measure_schemes(each)
            exhaustive(each)
            while settle(each, 6).refused:
                exhaustive(each)
        assert settle(problem, 6).finalists[0] == settle(alone, 6).finalists[0]
        assert all(len(set(choices)) == len(choices) <= AT_ONCE for choices in asked)
        assert len(asked) < len({each for choices in asked for each in choices})
