"""Shapes and spaces: values."""

import json
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.errors import ShapeError
from amoeba_plugin.shape import ShapeSpace, SubnetShape, parse_depth, parse_width

SHAPES = st.builds(
    lambda depth, top, extra: SubnetShape(depth, Fraction(top, top + extra)),
    st.integers(2, 400).map(lambda sublayers: sublayers / 2),
    st.integers(1, 64),
    st.integers(0, 64),
)


@given(SHAPES)
def test_a_depth_is_an_integer_unless_it_ends_in_a_half(shape: SubnetShape) -> None:
    assert isinstance(shape.depth, int) == (shape.depth % 1 == 0)
    assert shape == SubnetShape(float(shape.depth), shape.width) != SubnetShape(shape.depth + 0.5, shape.width)
    assert json.loads(json.dumps(shape.depth)) == parse_depth(str(shape.depth)) == shape.depth


@given(SHAPES)
def test_a_shape_is_read_back_from_its_text(shape: SubnetShape) -> None:
    assert SubnetShape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["24x7/8", "24X0.875", " 24x7/8 "])
def test_spellings_of_one_shape(text: str) -> None:
    assert SubnetShape.parse(text) == SubnetShape(24, Fraction(7, 8))


def test_blanks_are_passed_over() -> None:
    assert SubnetShape.parse(" 10.5 x 7/8 ") == SubnetShape.parse("10.5x7/8")


def test_a_depth_alone_is_full_width() -> None:
    assert SubnetShape.parse("24") == SubnetShape(24, Fraction(1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x1",
        "0x1",
        "12x0",
        "12x9/8",
        "12x1/0",
        "12xx1",
        "a",
        "1.4x1",
        "1.x1",
        ".5x1",
        "1.5.5",
        "nan",
        "1e1",
        "-2x1",
        "1_0",
        "\uff11x1",
        "10x1_0/2_0",
        "9" * 5000,
        f"10.{'9' * 5000}",
        f"10x1/{'9' * 5000}",
        f"10x0.{'0' * 4299}1",
        "10x1e-999999999",
    ],
)
def test_what_is_no_shape_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ShapeError, match="for example 24x7/8"):
        SubnetShape.parse(text)


@pytest.mark.parametrize(
    "width", ["0", "-1/2", "9/8", "nan", "snan", "inf", "wide", "1/0", "1e999999999", "1e-999999999"]
)
def test_what_is_no_width_is_refused(width: str) -> None:
    with pytest.raises(ShapeError, match="write 1, 7/8 or 0.75"):
        parse_width(width)


def test_a_space_is_a_grid_largest_first() -> None:
    space = ShapeSpace((8, 12, 10.0, 8), (Fraction(3, 4), Fraction(1)))
    assert [str(shape) for shape in space] == ["12x1", "12x3/4", "10x1", "10x3/4", "8x1", "8x3/4"]
    assert len(space) == 6
    assert (space.largest, space.smallest) == (SubnetShape(12, Fraction(1)), SubnetShape(8, Fraction(3, 4)))


@given(st.integers())
def test_a_drawn_shape_is_of_the_space_and_the_seed_decides_it(seed: int) -> None:
    space = ShapeSpace((12, 10, 8), (Fraction(1), Fraction(7, 8)))
    assert space.sample(random.Random(seed)) == space.sample(random.Random(seed))
    assert space.sample(random.Random(seed)) in space


def test_a_space_may_have_half_layers() -> None:
    space = ShapeSpace((2, 1.5, 1), (Fraction(1),))
    assert [str(shape) for shape in space] == ["2x1", "1.5x1", "1x1"]
    assert SubnetShape.parse("1.5") in space
    with pytest.raises(ShapeError, match="half a layer each"):
        ShapeSpace((1.25,), (Fraction(1),))


def test_a_shape_outside_names_the_space() -> None:
    space = ShapeSpace((12, 8), (Fraction(1), Fraction(3, 4)))
    with pytest.raises(ShapeError, match=r"shape 10x1 is outside the space depths \{12, 8\} x widths \{1, 3/4\}"):
        space.require("10x1")


@pytest.mark.parametrize("depth", [math.inf, math.nan, 1.25])
def test_depths_in_numbers_are_whole_or_half_ones(depth: float) -> None:
    with pytest.raises(ShapeError, match="whole or half layers"):
        SubnetShape(depth, Fraction(1))


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one depth"):
        ShapeSpace((), (Fraction(1),))
