"""Intervals by resampling documents: of scores, and of differences between shapes on the same documents.

Every metric here is a function of a ratio of sums over documents (accuracy: right answers over questions; perplexity:
log-likelihood over words), so that a resample is a vector of counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
ENDS = (2.5, 97.5)  # percentiles, of an interval of 95 %
Array = NDArray[np.float64]


def _identity(ratio: Array) -> Array:
    return ratio


def _perplexity(ratio: Array) -> Array:
    return np.exp(-ratio)


def _bits(ratio: Array) -> Array:
    return -ratio / np.log(2)


#: What becomes of the ratio, by lm_eval's name of an aggregation.
AGGREGATIONS: Mapping[str, Callable[[Array], Array]] = {
    "mean": _identity, "perplexity": _perplexity, "weighted_perplexity": _perplexity, "bits_per_byte": _bits,
}  # fmt: skip


def aggregated(values: Array, weights: Array, aggregation: str) -> Array:
    """Return the metric of each row.

    Args:
        values: Numerators, (rows, documents).
        weights: Denominators, likewise.
        aggregation: A key of ``AGGREGATIONS``.
    """
    with np.errstate(over="ignore"):  # of a model that is hopeless the perplexity is infinite
        return AGGREGATIONS[aggregation](values.sum(-1) / weights.sum(-1))


def resampled(values: Array, weights: Array, aggregation: str, seed: int) -> Array:
    """Return the metric of each row on resampled documents, (rows, resamples); all rows on the same ones.

    Arguments are those of :func:`aggregated`.
    """
    rng = np.random.default_rng(seed)
    documents = values.shape[-1]
    both = np.concatenate([values, weights]).T  # (documents, 2 rows)
    sums = np.empty((RESAMPLES, both.shape[-1]))
    for index in range(RESAMPLES):
        sums[index] = np.bincount(rng.integers(documents, size=documents), minlength=documents) @ both
    tops, bottoms = np.split(sums.T, 2)
    with np.errstate(over="ignore"):
        return AGGREGATIONS[aggregation](tops / bottoms)


def interval(samples: Array) -> tuple[float, float]:
    """Return the ends of the middle 95 % of resamples."""
    finite = np.nan_to_num(samples, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    low, high = np.percentile(finite, ENDS, method="nearest")  # between infinities there is nothing to interpolate
    return float(low), float(high)


def groups_that_cannot_be_ranked(samples: Array) -> list[list[int]]:
    """Return groups of rows of which no two differ for sure; every pair that cannot be ranked is in one.

    Args:
        samples: Of :func:`resampled`.
    """
    rows = range(len(samples))
    unsure = {pair for pair in combinations(rows, 2) if _straddles(samples[pair[0]], samples[pair[1]])}
    groups: list[list[int]] = []
    covered: set[tuple[int, int]] = set()
    for pair in sorted(unsure):
        if pair in covered:
            continue
        group = list(pair)
        for row in rows:
            if row not in group and all((min(row, each), max(row, each)) in unsure for each in group):
                group.append(row)
        group.sort()
        covered |= set(combinations(group, 2))
        groups.append(group)
    return groups


def _straddles(one: Array, other: Array) -> bool:
    low, high = interval(difference(one, other))
    return low <= 0 <= high


def difference(one: Array, other: Array) -> Array:
    """Return how much one is above the other, resample by resample; two infinities do not differ."""
    return np.where(one == other, 0.0, one - np.where(one == other, 0.0, other))
