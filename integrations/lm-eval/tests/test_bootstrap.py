"""Intervals and groups against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from amoeba_lm_eval import bootstrap
from amoeba_lm_eval.bootstrap import aggregated, difference, groups_that_cannot_be_ranked, interval, resampled
from lm_eval.api.registry import get_aggregation

RANDOM = np.random.default_rng(3)
VALUES, WEIGHTS = -RANDOM.uniform(5, 60, (3, 5)), RANDOM.integers(3, 20, (3, 5)).astype(float)


@pytest.mark.parametrize("how", bootstrap.AGGREGATIONS)
def test_numbers_are_those_of_the_harness(how: str):
    weights = WEIGHTS if "w" in how[0] or "bits" in how else np.ones_like(VALUES)
    for row in range(3):
        pairs = list(zip(VALUES[row], weights[row], strict=True))
        items = pairs if how in ("weighted_perplexity", "bits_per_byte") else [value for value, _ in pairs]
        assert aggregated(VALUES, weights, how)[row] == pytest.approx(float(get_aggregation(how)(items)))


def test_resampling_is_drawing_documents_with_replacement_the_same_for_all_rows(monkeypatch: pytest.MonkeyPatch):
    """All 3125 resamples of five documents, by hand, against many drawn ones: paired differences, too."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 40_000)
    drawn = [list(each) for each in itertools.product(range(5), repeat=5)]
    every = np.array([[math.exp(-VALUES[row, of].sum() / WEIGHTS[row, of].sum()) for of in drawn] for row in range(3)])
    found = resampled(VALUES, WEIGHTS, "weighted_perplexity", seed=1)
    for exact, near in ((every[1], found[1]), (every[1] - every[0], difference(found[1], found[0]))):
        grid = (5, 25, 50, 75, 95)
        scale = np.ptp(np.percentile(exact, (5, 95)))
        assert np.percentile(near, grid) == pytest.approx(np.percentile(exact, grid), abs=0.03 * scale)
        assert interval(near) == pytest.approx(np.percentile(exact, (2.5, 97.5)), abs=0.05 * scale)
    apart = np.ptp(np.percentile(every[1] - every[0], (5, 95)))
    rng = np.random.default_rng(0)
    assert apart != pytest.approx(np.ptp(np.percentile(every[1] - rng.permutation(every[0]), (5, 95))), rel=0.05)


def test_resampling_is_a_loop_over_draws_and_the_same_at_the_same_seed():
    rng = np.random.default_rng(7)
    slow = []
    for _ in range(bootstrap.RESAMPLES):
        of = rng.integers(5, size=5)
        slow.append([VALUES[row, of].sum() / WEIGHTS[row, of].sum() for row in range(3)])
    found = resampled(VALUES, WEIGHTS, "mean", seed=7)
    np.testing.assert_allclose(found, np.array(slow).T)
    assert (found == resampled(VALUES, WEIGHTS, "mean", seed=7)).all()
    assert not (found == resampled(VALUES, WEIGHTS, "mean", seed=8)).all()


def test_every_pair_that_cannot_be_ranked_is_in_a_group_and_no_other():
    rng = np.random.default_rng(5)
    for count in (1, 2, 3, 6):
        samples = rng.uniform(0, 4, (count, 1)) + rng.normal(0, 0.4, (count, 400))
        samples[-1] = samples[0]  # the same everywhere: their difference is 0
        groups = groups_that_cannot_be_ranked(samples)
        told = {pair for group in groups for pair in itertools.combinations(group, 2)}
        unsure = set()
        for one, other in itertools.combinations(range(count), 2):
            low, high = interval(samples[one] - samples[other])
            if low <= 0 <= high:
                unsure.add((one, other))
        assert told == unsure
        assert len({tuple(group) for group in groups}) == len(groups)


def test_what_is_infinite_is_no_reason_to_fail():
    values, weights = np.array([[-1e6, -1.0], [-2e6, -1.0]]), np.ones((2, 2))
    samples = resampled(values, weights, "perplexity", seed=0)
    assert interval(samples[0])[1] == math.inf
    assert not np.isnan(difference(samples[0], samples[1])).any()
    assert groups_that_cannot_be_ranked(samples) == [[0, 1]]
