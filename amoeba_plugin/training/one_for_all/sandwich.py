"""Which subnets a micro-batch trains: the sandwich rule, as a pure function of seed and step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from amoeba_plugin.shape import ShapeSpace, SubnetShape

Value = TypeVar("Value")


@dataclass(frozen=True)
class SandwichSampler:
    """Draws the largest shape, ``num_random`` shapes between, and the smallest, in this order.

    Nothing is remembered between calls, so every rank draws the same shapes, and so does a resumed run.

    >>> from fractions import Fraction
    >>> sampler = SandwichSampler(ShapeSpace((12, 10, 8), (Fraction(1), Fraction(3, 4))), num_random=2, seed=0)
    >>> [str(shape) for shape in sampler.shapes(step=0)]
    ['12x1', '8x1', '8x3/4', '8x3/4']

    Args:
        space: Where shapes are drawn from.
        num_random: Shapes between largest and smallest; the paper has 2.
        seed: Of the training; the draws of a micro-batch depend on it and on the step alone.
        listed: Shapes that the random ones are drawn from, depth and width together; empty: depth and width are drawn
            apart, as in the paper.
    """

    space: ShapeSpace
    num_random: int = 2
    seed: int = 0
    listed: tuple[SubnetShape, ...] = ()

    def shapes(self, step: int, micro_step: int = 0) -> list[SubnetShape]:
        """Return the shapes of one micro-batch, largest first, smallest last.

        The draws may repeat a shape. A space of one shape gives just that one.

        Args:
            step: Optimizer steps done so far.
            micro_step: Micro-batches of the current optimizer step done so far.
        """
        if len(self.space) == 1:
            return [self.space.largest]
        rng = random.Random(_text(self.seed, step, micro_step))
        return [self.space.largest, *self._between(rng), self.space.smallest]

    def _between(self, rng: random.Random) -> list[SubnetShape]:
        if self.listed:
            return _draw(rng, self.listed, self.num_random)
        # Depths: uniform over all but the largest, with replacement. Widths: uniform over all, without replacement.
        # Drawn independently, paired by position (arXiv:2411.10606, sandwich sampling; the reference code's draws).
        depths = [rng.choice(self.space.depths[1:] or self.space.depths) for _ in range(self.num_random)]
        widths = _draw(rng, self.space.widths, self.num_random)
        return [SubnetShape(depth, width) for depth, width in zip(depths, widths, strict=True)]


def step_seed(seed: int, step: int, micro_step: int) -> int:
    """Return a seed in [0, 2**63) for whatever else a micro-batch draws."""
    return random.Random(_text(seed, step, micro_step)).getrandbits(63)


def _draw(rng: random.Random, values: Sequence[Value], count: int) -> list[Value]:
    """Draw without replacement where there are enough values."""
    return rng.sample(values, count) if len(values) >= count else rng.choices(values, k=count)


def _text(seed: int, step: int, micro_step: int) -> str:
    # A string is hashed by SHA-512: the same numbers in every process and on every platform.
    return f"{seed}/{step}/{micro_step}"
