"""Costs of shapes that were not measured: non-negative sums of sizes, fitted to those that were, with intervals.

The time of a layer is a part of its own and parts by heads and by neurons; of a prefill each part grows with its
tokens, and attention with their square. An interval is the error that the fit makes of shapes it is fitted without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from amoeba_plugin.deployment.profiling.profile import FlowProfile, Round
from amoeba_plugin.deployment.profiling.work import Work

COVERED = 0.95  # share of the errors of left-out shapes that an interval covers
FEWEST = 5  # shapes that a fit can be tried on


@dataclass(frozen=True)
class Prediction:
    """A cost between the ends of its interval; measured where the shape was."""

    value: float
    low: float
    high: float
    measured: bool = False

    def __str__(self) -> str:
        if self.measured:
            return f"{self.value:.4g}"
        return f"~{self.value:.3g} ±{self.high / self.value - 1:.0%}"


@dataclass(frozen=True)
class Sample:
    """A measured cost: of a shape, of so many tokens where that matters, by round."""

    shape: str
    work: Work
    tokens: int
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """The least: what else the machine does only adds."""
        return min(self.values)

    @property
    def spread(self) -> float:
        """How far the next process was above it, relative: how well the least is known."""
        return sorted(self.values)[1] / self.value - 1 if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class CostModel:
    """One kind of cost of one flow.

    Attributes:
        samples: What was measured.
    """

    samples: Sequence[Sample]

    def predict(self, work: Work, tokens: int = 0) -> Prediction:
        """Return the cost of sizes; where a shape of these very sizes was measured at so many tokens, that."""
        for sample in self.samples:
            if sample.work == work and sample.tokens == tokens:
                width = 1 + sample.spread
                return Prediction(sample.value, sample.value / width, sample.value * width, measured=True)
        value = float(_terms(work, tokens) @ self.weights)
        return Prediction(value, value / self.factor, value * self.factor)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """Of the terms."""
        return _fitted(self.samples)

    @cached_property
    def factor(self) -> float:
        """By which a predicted cost may be off, either way."""
        errors = sorted(abs(error) for error in self.left_out_errors())
        if not errors:
            return math.inf
        return math.exp(errors[min(math.ceil(COVERED * len(errors)), len(errors)) - 1])

    def left_out_errors(self) -> list[float]:
        """Return ``log(predicted / measured)`` of every sample, by a fit without its shape."""
        shapes = dict.fromkeys(sample.shape for sample in self.samples)
        if len(shapes) < FEWEST:
            return []
        found = []
        for shape in shapes:
            weights = _fitted([sample for sample in self.samples if sample.shape != shape])
            for sample in self.samples:
                if sample.shape == shape:
                    predicted = max(float(_terms(sample.work, sample.tokens) @ weights), 1e-30)
                    found.append(math.log(predicted / sample.value))
        return found


def cost_models(profile: FlowProfile) -> dict[str, CostModel]:
    """Return what predicts costs of a flow's shapes: "prefill" and "decode" in seconds, "load" too, "memory" and "file"
    in bytes."""
    kinds: dict[str, Callable[[Round], Mapping[int, float]]] = {
        "prefill": lambda each: {tokens: profile.seconds(took) for tokens, took in each.prefill.items()},
        "decode": lambda each: {0: profile.seconds(each.decode)},
        "load": lambda each: {0: profile.seconds(each.load)},
        "memory": lambda each: {0: float(each.peak)},
    }
    models = {kind: CostModel(_samples(profile, values)) for kind, values in kinds.items()}
    models["file"] = CostModel([
        Sample(name, Work(*cost.work), 0, (cost.bytes,)) for name, cost in profile.shapes.items() if cost.rounds
    ])  # fmt: skip
    return models


def _samples(profile: FlowProfile, values: Callable[[Round], Mapping[int, float]]) -> list[Sample]:
    found: dict[tuple[str, int], list[float]] = {}  # by shape and tokens
    for name, cost in profile.shapes.items():
        for each in cost.rounds:
            for tokens, value in values(each).items():
                found.setdefault((name, tokens), []).append(value)
    return [Sample(name, Work(*profile.shapes[name].work), tokens, tuple(of)) for (name, tokens), of in found.items()]


def _terms(work: Work, tokens: int) -> NDArray[np.float64]:
    base = list(work.terms)
    if tokens:
        base += [tokens * each for each in base] + [tokens**2 * work.heads]
    return np.array(base)


def _fitted(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Fit relative errors: a small shape counts as much as a large one."""
    rows = np.stack([_terms(sample.work, sample.tokens) / sample.value for sample in samples])
    scale = np.maximum(rows.max(axis=0), 1e-300)
    weights, _ = nnls(rows / scale, np.ones(len(rows)))
    found: NDArray[np.float64] = weights / scale
    return found
