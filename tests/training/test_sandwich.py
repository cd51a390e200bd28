"""Which shapes a step trains: always the largest and the smallest, and others that differ from step to step."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.shape import ShapeSpace
from amoeba_plugin.training.one_for_all.sandwich import SandwichSampler, step_seed

spaces = st.builds(
    ShapeSpace,
    st.lists(st.integers(1, 40), min_size=1, max_size=8).map(tuple),
    st.lists(st.fractions("1/8", 1, max_denominator=8), min_size=1, max_size=5).map(tuple),
)


@given(spaces, st.integers(0, 4), st.integers(0, 2**32), st.integers(0, 10**6), st.integers(0, 7))
def test_sandwich_always_has_largest_and_smallest(
    space: ShapeSpace, num_random: int, seed: int, step: int, micro_step: int
):
    shapes = SandwichSampler(space, num_random, seed).shapes(step, micro_step)
    assert shapes == SandwichSampler(space, num_random, seed).shapes(step, micro_step)
    if len(space) == 1:
        assert shapes == [space.largest]
        return
    assert (shapes[0], shapes[-1], len(shapes)) == (space.largest, space.smallest, num_random + 2)
    between = shapes[1:-1]
    assert all(shape in space for shape in between)
    if len(space.depths) > 1:
        assert all(shape.depth < space.largest.depth for shape in between)
    if len(space.widths) >= num_random:
        assert len({shape.width for shape in between}) == num_random


def test_sandwich_reaches_every_depth_below_the_largest_and_every_width():
    space = ShapeSpace(tuple(range(20, 33)), (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(5, 8)))
    sampler = SandwichSampler(space, 2, 42)
    drawn = [shape for step in range(300) for shape in sampler.shapes(step)[1:-1]]
    assert {shape.depth for shape in drawn} == set(range(20, 32))
    assert {shape.width for shape in drawn} == set(space.widths)


def test_every_micro_step_draws_anew():
    sampler = SandwichSampler(ShapeSpace(tuple(range(1, 33)), (Fraction(1), Fraction(1, 2))), 2, 0)
    assert len({tuple(sampler.shapes(step, micro)) for step in range(5) for micro in range(4)}) == 20
    assert len({step_seed(0, step, micro) for step in range(5) for micro in range(4)}) == 20
