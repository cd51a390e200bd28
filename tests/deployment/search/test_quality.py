"""Intervals against what they promise: they hold what is true nineteen times in twenty, by drawing again and again."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from amoeba_plugin.deployment.search.quality import Quality

TRIALS = 2000


def test_the_interval_of_a_ratio_holds_the_true_one():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(TRIALS):
        tokens = draw.integers(5, 40, 12)
        nats = tokens * draw.normal(3.0, 0.4, 12)  # a row's loss is its own, whatever its length
        found = Quality.ratio(list(zip(nats, tokens, strict=True)))
        assert found.value == pytest.approx(nats.sum() / tokens.sum())
        held += found.low <= 3.0 <= found.high
    assert 0.925 < held / TRIALS < 0.975


def test_of_rows_of_one_length_it_is_students():
    values = np.random.default_rng(1).normal(2.0, 1.0, 9)
    found = Quality.ratio([(each, 1.0) for each in values])
    wanted = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(wanted)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 10), (10, 10), (61, 100)])
def test_a_share_is_between_where_a_test_would_refuse_it(right: int, count: int):
    found = Quality.share([True] * right + [False] * (count - right))
    z = NormalDist().inv_cdf(0.975)
    for end in (found.low, found.high):  # Wilson: the shares that the one seen is just as far from as the test allows
        if 1e-9 < end < 1 - 1e-9:
            assert abs(right / count - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_difference_of_the_same_rows_is_known_better_than_either():
    draw = np.random.default_rng(2)
    held = narrower = 0
    for _ in range(TRIALS):
        hard = draw.normal(3.0, 0.5, 20)
        one = Quality.ratio([(each, 1.0) for each in hard + draw.normal(0.1, 0.05, 20)])
        other = Quality.ratio([(each, 1.0) for each in hard + draw.normal(0.0, 0.05, 20)])
        found = one.minus(other)
        held += found.low <= 0.1 <= found.high
        narrower += found.high - found.low < 0.3 * (one.high - one.low)
        assert found.value == pytest.approx(one.value - other.value)
    assert 0.925 < held / TRIALS < 0.975
    assert narrower > 0.99 * TRIALS


def test_a_sum_is_compared_by_its_parts():
    draw = np.random.default_rng(3)
    rows, few = draw.normal(3.0, 0.5, 30), draw.normal(0.2, 0.1, 6)
    judged = Quality.ratio([(each, 1.0) for each in rows])
    harmed = judged.plus(Quality.ratio([(each, 1.0) for each in few]))
    assert harmed.value == pytest.approx(rows.mean() + few.mean())
    found = harmed.minus(judged)  # the rows are the same: what is left is the harm
    assert found.value == pytest.approx(few.mean())
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 5, loc=few.mean(), scale=stats.sem(few)))


def test_without_samples_two_intervals_are_all_there_is():
    one, other = Quality(3.0, 2.7, 3.3), Quality(2.0, 1.6, 2.4)
    found = one.minus(other)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 0.5, 1.5))
    assert found.tells
    assert not one.minus(Quality(2.8, 2.5, 3.1)).tells
    assert Quality.ratio([(3.0, 1.0)]).high == math.inf
