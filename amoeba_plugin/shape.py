"""Subnet shapes and the finite grid they come from: values, no torch.

>>> SubnetShape.parse("24x7/8")
SubnetShape(depth=24, width=Fraction(7, 8))
>>> space = ShapeSpace(depths=(12, 8), widths=(Fraction(1), Fraction(3, 4)))
>>> str(space.largest), str(space.smallest), len(space)
('12x1', '8x3/4', 4)

A depth counts layers; attention and MLP are half a layer each, so a depth may end in .5:

>>> str(SubnetShape.parse("10.5x7/8")), str(SubnetShape.parse("10.0"))
('10.5x7/8', '10x1')
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from amoeba_plugin.errors import ShapeError

TIMES = "\N{MULTIPLICATION SIGN}"  # looks like an x where a shape is pasted from a text
LONGEST_NUMBER = 50  # characters; Python takes 1e-999999999 for a number, and hours to write it down
DEPTH = re.compile(r"\d+(\.\d+)?", re.ASCII)
WIDTH = re.compile(r"-?(\d+/\d+|(\d+\.?\d*|\.\d+)(e-?\d\d?)?)", re.ASCII)


@dataclass(frozen=True, order=True)
class SubnetShape:
    """A point of the space: layers kept, and the share of channels kept in each of them, in (0, 1].

    ``depth`` is an int, or ends in .5 where an odd number of sublayers (attention or MLP, half a layer each) is kept.
    """

    depth: float
    width: Fraction

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", half_steps(self.depth))
        if self.depth < 1:
            raise ShapeError(f"depth {self.depth}: a subnet keeps at least 1 layer")
        if not 0 < self.width <= 1:
            raise ShapeError(f"width {self.width}: a share of channels lies in (0, 1]; write 1, 7/8 or 0.75")

    @classmethod
    def parse(cls, text: str | SubnetShape) -> SubnetShape:
        """Read ``DEPTHxWIDTH``: "24x7/8", "24x0.875", "24" (full width), "10.5x1" (21 sublayers).

        Raises:
            ShapeError: If the text is anything else.
        """
        if isinstance(text, SubnetShape):
            return text
        depth, _, width = str(text).strip().lower().partition("x")
        try:
            return cls(parse_depth(depth), parse_width(width or "1"))
        except ShapeError as error:
            hint = "; the sign between them is the letter x" if TIMES in str(text) else ""
            raise ShapeError(
                f"'{text}' is not a subnet shape ({error}); write DEPTHxWIDTH, for example 24x7/8{hint}"
            ) from error

    def __str__(self) -> str:
        return f"{self.depth}x{self.width}"


@dataclass(frozen=True)
class ShapeSpace:
    """The grid of shapes that one training serves: every depth with every width, both stored largest first."""

    depths: tuple[float, ...]
    widths: tuple[Fraction, ...]

    def __post_init__(self) -> None:
        if not self.depths or not self.widths:
            raise ShapeError("a shape space needs at least one depth and one width")
        object.__setattr__(self, "depths", tuple(sorted(set(map(half_steps, self.depths)), reverse=True)))
        object.__setattr__(self, "widths", tuple(sorted(set(self.widths), reverse=True)))
        SubnetShape(min(self.depths), min(self.widths))

    @property
    def largest(self) -> SubnetShape:
        """The deepest and widest shape."""
        return SubnetShape(self.depths[0], self.widths[0])

    @property
    def smallest(self) -> SubnetShape:
        """The shallowest and narrowest shape."""
        return SubnetShape(self.depths[-1], self.widths[-1])

    def __contains__(self, shape: object) -> bool:
        return isinstance(shape, SubnetShape) and shape.depth in self.depths and shape.width in self.widths

    def __iter__(self) -> Iterator[SubnetShape]:
        return (SubnetShape(depth, width) for depth in self.depths for width in self.widths)

    def __len__(self) -> int:
        return len(self.depths) * len(self.widths)

    def sample(self, rng: random.Random) -> SubnetShape:
        """Draw a depth and a width, each uniform and independent of the other."""
        return SubnetShape(rng.choice(self.depths), rng.choice(self.widths))

    def require(self, shape: SubnetShape | str) -> SubnetShape:
        """Return the shape, parsed.

        Raises:
            ShapeError: If the space does not hold it.
        """
        parsed = SubnetShape.parse(shape)
        if parsed not in self:
            raise ShapeError(
                f"shape {parsed} is outside the space {self}; take a depth and a width from it, "
                "or make the strategy or the adapter anew with more depths or widths"
            )
        return parsed

    def __str__(self) -> str:
        return f"depths {{{', '.join(map(str, self.depths))}}} x widths {{{', '.join(map(str, self.widths))}}}"


def half_steps(depth: float) -> float:
    """Return a depth as an int where it is whole, so that equal depths have one text.

    Raises:
        ShapeError: If it is no multiple of 1/2.
    """
    if isinstance(depth, float) and not (depth * 2).is_integer():  # nor is what is infinite, or NaN
        raise ShapeError(f"depth {depth}: attention and MLP are half a layer each, so write whole or half layers, 10.5")
    return int(depth) if depth == int(depth) else depth


def parse_depth(text: str | float) -> float:
    """Read a depth: "24", 24 and "24.0" are the same, "10.5" is 21 sublayers.

    Raises:
        ShapeError: If it is no number, or no multiple of 1/2.
    """
    number = str(text).strip()
    if len(number) > LONGEST_NUMBER or not DEPTH.fullmatch(number):
        raise ShapeError(f"depth '{text}' is no number of layers")
    return half_steps(float(number) if "." in number else int(number))


def require_distinct_depths(texts: Iterable[str | float]) -> None:
    """Refuse depths that are written twice, "10" and "10.0": of what they name, only the last would count.

    What is no depth at all is passed over.

    Raises:
        ShapeError: Naming both.
    """
    seen: dict[float, str | float] = {}
    for text in texts:
        try:
            depth = parse_depth(text)
        except ValueError:
            continue
        if depth in seen:
            raise ShapeError(f"{seen[depth]!r} and {text!r} are the same depth, {depth}; remove one of them")
        seen[depth] = text


def parse_width(text: str | float | Fraction) -> Fraction:
    """Read a width exactly: "7/8", "0.875" and 0.875 are the same fraction.

    Raises:
        ShapeError: If it is no number in (0, 1].
    """
    number = str(text).strip().lower()
    try:
        if len(number) > LONGEST_NUMBER or not WIDTH.fullmatch(number):
            raise ShapeError(f"width '{text}' is no number; write 1, 7/8 or 0.75")
        width = Fraction(number)
    except ZeroDivisionError as error:
        raise ShapeError(f"width '{text}' is no number; write 1, 7/8 or 0.75") from error
    if not 0 < width <= 1:
        raise ShapeError(f"width {text}: a share of channels lies in (0, 1]; write 1, 7/8 or 0.75")
    return width
