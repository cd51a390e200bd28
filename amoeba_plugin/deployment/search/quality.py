"""How good a shape is, with the interval that so few rows or questions leave, and whether two shapes can be told apart.

A value is a ratio of sums, such as nats by tokens, over units that are taken as independent: rows of text, questions.
Two shapes are judged on the same units, so their difference is known better than either of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

COVERED = 0.95
Sample = tuple[tuple[float, float], ...]  # what every unit adds above and below the line


@dataclass(frozen=True)
class Quality:
    """A value between the ends of its interval.

    Attributes:
        value: In the evaluator's unit.
        low: Of the interval.
        high: Likewise.
        samples: What it was made of, to compare it with another one by units; a value that is a sum has several.
    """

    value: float
    low: float
    high: float
    samples: tuple[Sample, ...] = ()

    @classmethod
    def ratio(cls, sample: Sequence[tuple[float, float]]) -> Quality:
        """Return the sum of the first numbers by the sum of the second, with Student's interval over units.

        >>> found = Quality.ratio([(2.0, 1.0), (4.0, 1.0)])
        >>> round(found.value, 3), round(found.high, 2)
        (3.0, 15.71)
        """
        of = tuple((float(above), float(below)) for above, below in sample)
        value, residuals = _ratio(of)
        half = _half_width([residuals])
        return cls(value, value - half, value + half, (of,))

    @classmethod
    def share(cls, right: Sequence[bool]) -> Quality:
        """Return the share of units that are right, with Wilson's interval, which is one for few units and 0 or 1 too.

        >>> found = Quality.share([True] * 5)
        >>> found.value, round(found.low, 3)
        (1.0, 0.566)
        """
        count, share, z = len(right), sum(right) / len(right), float(ndtri((1 + COVERED) / 2))
        middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
        low, high = min(middle - half, share), max(middle + half, share)  # equal at 0 and 1, but for rounding
        return cls(share, max(low, 0.0), min(high, 1.0), (tuple((float(each), 1.0) for each in right),))

    def plus(self, other: Quality) -> Quality:
        """Return the sum of two that are independent."""
        value = self.value + other.value
        low = math.hypot(self.value - self.low, other.value - other.low)
        high = math.hypot(self.high - self.value, other.high - other.value)
        return Quality(value, value - low, value + high, self.samples + other.samples)

    def minus(self, other: Quality) -> Quality:
        """Return how far it is above another one: by units where both were judged on the same, else of two intervals.

        What only one of them has, such as the harm of a scheme, is compared with none.
        """
        value = self.value - other.value
        most = max(len(self.samples), len(other.samples))
        pairs = [(_at(self, index), _at(other, index)) for index in range(most)]
        if not most or not self.samples or not other.samples or any(_unlike(*pair) for pair in pairs):
            opposite = replace(other, value=-other.value, low=-other.high, high=-other.low)
            return replace(self.plus(opposite), samples=())
        half = _half_width([_residuals(one) - _residuals(another) for one, another in pairs])
        return Quality(value, value - half, value + half)

    @property
    def tells(self) -> bool:
        """Whether a difference is one: its interval is without zero."""
        return self.low > 0 or self.high < 0


def _ratio(sample: Sample) -> tuple[float, NDArray[np.float64]]:
    """Return the ratio, and what every unit adds to its error."""
    above, below = np.array(sample, dtype=np.float64).T
    value = float(above.sum() / below.sum())
    return value, (above - value * below) / below.sum()


def _residuals(sample: Sample) -> NDArray[np.float64]:
    return _ratio(sample)[1] if sample else np.zeros(())  # what is not there differs by all of the other


def _half_width(residuals: Sequence[NDArray[np.float64]]) -> float:
    """Return half an interval's width, of a sum over several groups of units."""
    fewest = min(map(len, residuals))
    if fewest < 2:
        return math.inf
    variance = sum(len(each) / (len(each) - 1) * float(each @ each) for each in residuals)
    return float(stdtrit(fewest - 1, (1 + COVERED) / 2)) * math.sqrt(variance)


def _at(quality: Quality, index: int) -> Sample:
    return quality.samples[index] if index < len(quality.samples) else ()


def _unlike(one: Sample, other: Sample) -> bool:
    return bool(one and other) and len(one) != len(other)
