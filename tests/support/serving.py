"""A service without a model: steps of its backend take what was predicted, on a clock of its own; requests to it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency, Slo, Target
from amoeba_plugin.shape import ShapeSpace, SubnetShape

SPACE = ShapeSpace((4, 2), (Fraction(1), Fraction(1, 2)))
SIZES = {str(shape): shape.depth * float(shape.width) for shape in SPACE}


def latency_of(shape: SubnetShape, tokens: int) -> Latency:
    return Latency(tokens * SIZES.get(str(shape), 1.0), SIZES.get(str(shape), 1.0))


@dataclass
class Clocked:
    """A backend whose steps take exactly what was predicted, on a clock of its own; it waits for its gate."""

    now: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    space: ShapeSpace = SPACE
    fails: tuple[int, ...] = ()
    batches: list[int] = field(default_factory=list)
    context: int | None = None
    at_once: int = 1

    def prefill(self, shape: SubnetShape, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        assert self.gate.wait(60)
        if tokens[0] in self.fails:
            raise RuntimeError("out of memory")
        self.now += latency_of(shape, len(tokens)).ttft
        return [*tokens], self._logits(tokens[0])

    def step(self, shape: SubnetShape, cache: Any, token: int) -> Tensor:
        self.now += latency_of(shape, 0).tpot
        cache.append(token)
        return self._logits(len(cache))

    def steps(self, shape: SubnetShape, caches: Sequence[Any], tokens: Sequence[int]) -> list[Tensor]:
        if 49 in tokens:
            raise RuntimeError("too much at once")
        self.now -= latency_of(shape, 0).tpot * (len(caches) - 1) / 2  # half of what they take one by one
        self.batches.append(len(caches))
        return [self.step(shape, cache, token) for cache, token in zip(caches, tokens, strict=True)]

    def _logits(self, token: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(token % 50), 50).float()


def service_of(backend: Clocked, **options: Any) -> ElasticService:
    return ElasticService(backend, latency_of, clock=lambda: backend.now, **options)


targets = (
    st.none()
    | st.floats(0.1, 1).map(lambda share: Target(share, True))
    | st.integers(1, 400).map(lambda seconds: Target(float(seconds)))
)
asked = st.builds(
    Request,
    st.integers(1, 30).map(lambda tokens: [1] * tokens),
    st.builds(Slo, targets, targets) | st.builds(Slo, total=st.integers(10, 500).map(float)),
    st.integers(1, 12),
    best_effort=st.booleans(),
)
