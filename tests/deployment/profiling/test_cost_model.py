"""Costs are predicted where they were not measured, with intervals that hold; what tells most is measured."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoeba_plugin.deployment.profiling.cost_model import CostModel, Sample, cost_models
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Round, Seconds, ShapeCost
from amoeba_plugin.deployment.profiling.work import Work, telling

GRID = [
    Work(2 * layers, layers * heads, layers * neurons)
    for layers in range(12, 3, -1)
    for heads, neurons in [(8, 512), (7, 448), (6, 384), (5, 320), (4, 256)]
]


def seconds(work: Work, tokens: int) -> float:
    per_token = 1e-6 + 2e-7 * work.sublayers + 1e-7 * work.heads + 2e-8 * work.neurons
    fixed = 1e-3 + 2e-5 * work.sublayers + 3e-5 * work.heads + 4e-7 * work.neurons
    return fixed + tokens * per_token + 1e-9 * tokens**2 * work.heads


def sampled(works: list[Work], noise: float = 0.0, seed: int = 0) -> list[Sample]:
    draw = random.Random(seed)
    return [
        Sample(str(work), work, tokens, tuple(seconds(work, tokens) * (1 + noise * draw.random()) for _ in range(4)))
        for work in works
        for tokens in (32, 128, 256)
    ]


def test_a_quarter_of_the_grid_tells_the_rest_at_any_length():
    chosen = [GRID[index] for index in telling(GRID, 11)]
    model = CostModel(sampled(chosen))
    for work, tokens in itertools.product(GRID, (32, 100, 256)):
        assert model.predict(work, tokens).value == pytest.approx(seconds(work, tokens), rel=1e-3)
    assert model.factor < 1.01


@given(st.integers(0, 1000), st.floats(0.01, 0.2))
@settings(max_examples=20)
def test_intervals_hold_for_shapes_that_were_left_out(seed: int, noise: float):
    chosen = {GRID[index] for index in telling(GRID, 12)}
    model = CostModel(sampled(sorted(chosen, key=str), noise, seed))
    rest = [work for work in GRID if work not in chosen]
    held = [
        prediction.low <= seconds(work, 128) * (1 + noise / 5) <= prediction.high * (1 + noise / 5)
        for work in rest
        for prediction in [model.predict(work, 128)]
    ]
    assert np.mean(held) > 0.8
    assert 1 <= model.factor < 1 + 3 * noise


def test_what_was_measured_is_told_as_it_was():
    model = CostModel([Sample("a", GRID[0], 32, (0.9, 0.5, 0.55)), Sample("b", GRID[-1], 32, (0.1,))])
    told = model.predict(GRID[0], 32)
    assert (told.value, told.measured) == (0.5, True)
    assert told.high == pytest.approx(0.55)
    assert not model.predict(GRID[0], 64).measured
    assert model.factor == math.inf  # two shapes do not tell how far a third may be off
    assert str(told) == "0.5"


def test_costs_never_fall_with_any_size():
    model = CostModel(sampled([GRID[index] for index in telling(GRID, 9)], 0.2))
    for work in GRID:
        for more in (
            Work(work.sublayers + 2, work.heads, work.neurons),
            Work(work.sublayers, work.heads, work.neurons + 9),
        ):
            assert model.predict(more, 65).value >= model.predict(work, 65).value * (1 - 1e-12)


def test_the_design_is_no_worse_than_random_ones():
    def information(indices: list[int]) -> float:
        rows = np.array([GRID[index].terms for index in indices])
        rows = rows / np.abs([work.terms for work in GRID]).max(axis=0)
        return float(np.linalg.slogdet(rows.T @ rows + 1e-6 * np.eye(4))[1])

    chosen = telling(GRID, 11)
    assert chosen == sorted(set(chosen))
    assert {0, len(GRID) - 1} <= set(chosen)
    draw = random.Random(0)
    others = [information(draw.sample(range(len(GRID)), 11)) for _ in range(300)]
    assert information(chosen) >= max(others) - 0.3
    assert telling(GRID[:3], 9) == [0, 1, 2]


def test_kinds_of_cost_and_which_clock_counts():
    def visit(scale: float) -> Round:
        took = Seconds(wall=2 * scale, cpu=scale)
        return Round(load=took, prefill={8: took}, decode=took, peak=int(100 * scale))

    shapes = {"a": ShapeCost(work=(2, 2, 2), bytes=7, rounds=[visit(3), visit(2)])}
    one = FlowProfile(engine={}, threads=1, batch=1, decoded=4, shapes=shapes)
    assert one.busy
    found = {kind: model.samples[0].value for kind, model in cost_models(one).items()}
    assert found == {"prefill": 2, "decode": 2, "load": 2, "memory": 200, "file": 7}
    several = one.model_copy(update={"threads": 2})
    assert cost_models(several)["decode"].samples[0].value == 4
    assert not several.busy
