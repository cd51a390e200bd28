"""What a unit may be compressed to, and what that counts: bits of weights with their scales, and shares of zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from compressed_tensors.quantization import QuantizationArgs

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.selection.layerwise.units import Unit

Number = TypeVar("Number", int, float)
WHOLE = 16  # bits of a weight that is not quantized, and of a scale: engines compute in half precision
SERVED, READ = (4, 8), (2, 3)  # bits that engines serve; bits that transformers alone reads back
SIZES = (128, 64, 32)  # of groups, as engines have kernels for
MOST_SPARSE = 0.7
SPARSITIES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True, order=True)
class Option:
    """Bits of a weight, 16 where it is not quantized, and the share of weights that are zero."""

    bits: int = WHOLE
    sparsity: float = 0.0


@dataclass(frozen=True)
class Grid:
    """How weights are rounded: integers, with a scale for some inputs of a row.

    Attributes:
        group_size: Inputs that share a scale; -1: all of a row.
        symmetric: Without zero points.
    """

    group_size: int
    symmetric: bool = True

    @classmethod
    def fitting(cls, units: Iterable[Unit], symmetric: bool = True) -> Grid:
        """Return one of the largest groups that divide the inputs of all units; of rows where none does."""
        columns = math.gcd(*(unit.columns for unit in units))
        return cls(next((size for size in SIZES if columns % size == 0), -1), symmetric)

    def arguments(self, bits: int) -> QuantizationArgs:
        """Return what compressed-tensors makes of it."""
        return QuantizationArgs(**self.fields(bits))

    def fields(self, bits: int) -> dict[str, object]:
        """Return the fields of a scheme's weights in a recipe."""
        fields: dict[str, object] = {"num_bits": bits, "type": "int", "symmetric": self.symmetric}
        by_group = {"strategy": "group", "group_size": self.group_size}
        return fields | (by_group if self.group_size > 0 else {"strategy": "channel"})

    def counted(self, bits: int, unit: Unit) -> float:
        """Return the bits that a weight of a unit takes, scales and zero points counted.

        >>> Grid(128).counted(4, Unit("0.o_proj", 0, ("o_proj",), 64, 256))
        4.125
        """
        if bits == WHOLE:
            return float(WHOLE)
        group = self.group_size if self.group_size > 0 else unit.columns
        return bits + (WHOLE + (0 if self.symmetric else bits)) / group


def pruned_columns(columns: int, sparsity: float) -> int:
    """Return how many weights of a row are made zero, as llm-compressor's Wanda rounds it.

    >>> pruned_columns(48, 0.3)
    14
    """
    return int(columns * sparsity)


def sparsity_of(columns: int, wanted: float) -> float:
    """Return the least sparsity that makes so large a share of every row zero, whole weights, at most ``MOST_SPARSE``.

    >>> sparsity_of(64, 0.4), pruned_columns(64, sparsity_of(64, 0.4))
    (0.40625, 26)
    """
    count = min(math.ceil(columns * wanted - 1e-9), pruned_columns(columns, MOST_SPARSE))
    share = count / columns
    return share if pruned_columns(columns, share) == count else math.nextafter(share, 1)


def counted_sparsity(option: Option, unit: Unit) -> float:
    """Return the share of zeros that a unit gets: whole weights of every row."""
    return pruned_columns(unit.columns, option.sparsity) / unit.columns


def require_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Return the bits that weights may have, ascending.

    Raises:
        RecipeError: If no host holds them.
    """
    known = {*READ, *SERVED, WHOLE}
    wrong = [each for each in bits if each not in known]
    if wrong or not bits or min(bits) == WHOLE:
        raise RecipeError(
            f"bits {', '.join(map(str, wrong or bits)) or '(none)'}: no host holds weights so; possible are 4 and 8, "
            "which engines serve, 2 and 3, which transformers alone reads, and 16, not quantized; give 4,8,16"
        )
    return tuple(sorted(set(bits)))


def require_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of zeros that units may have, ascending.

    Raises:
        RecipeError: If one is not from 0 to 0.7.
    """
    wrong = [each for each in sparsities if not 0 <= each <= MOST_SPARSE]
    if wrong or not any(sparsities):
        raise RecipeError(
            f"sparsities {', '.join(map(str, wrong or sparsities)) or '(none)'} are impossible; give shares from 0 to "
            f"{MOST_SPARSE}, one of them above 0"
        )
    return tuple(sorted(set(map(float, sparsities))))


def require_divided(grid: Grid, units: Sequence[Unit]) -> None:
    """Refuse groups that do not divide the inputs of a unit.

    Raises:
        RecipeError: Naming it, and what would fit.
    """
    odd = next((unit for unit in units if grid.group_size > 0 and unit.columns % grid.group_size), None)
    if odd is not None:
        size = Grid.fitting(units).group_size
        fitting = f"group_size {size}" if size > 0 else "channel-wise scales (group_size -1)"
        raise RecipeError(
            f"groups of {grid.group_size} do not divide the {odd.columns} inputs of {odd.name}; what fits this "
            f"model is {fitting}"
        )


def listed(text: str, kind: Callable[[str], Number], what: str) -> tuple[Number, ...]:
    """Return numbers from a list with commas.

    Raises:
        RecipeError: If one is none.

    >>> listed("4,8", int, "bits")
    (4, 8)
    """
    try:
        return tuple(kind(each) for each in text.split(",") if each.strip())
    except ValueError as error:
        raise RecipeError(
            f"{what} '{text}' are no numbers with commas between them; write 4,8,16 or 0,0.3,0.5"
        ) from error
