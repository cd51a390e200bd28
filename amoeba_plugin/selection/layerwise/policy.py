"""A layer-wise policy: bits and sparsity of every unit of a model, with the sensitivities they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.documents import Document, Part
from amoeba_plugin.selection.layerwise.options import READ, Grid, Option, counted_sparsity
from amoeba_plugin.selection.layerwise.units import Unit

Counted = Callable[[Unit, Option], float]
SHOWN = 3  # differences named in a message


class UnitPolicy(Part):
    """What one unit gets.

    Attributes:
        modules: Paths of its linears in the model.
        rows: Outputs of all of them.
        columns: Inputs.
        bits: Of a weight; 16: not quantized.
        sparsity: Share of weights that are zero.
        scores: What it loses by each option alone, by the option's name: "4 bits", "sparsity 0.5".
    """

    modules: list[str]
    rows: int
    columns: int
    bits: int
    sparsity: float
    scores: dict[str, float] = Field(default_factory=dict)

    def unit(self, name: str) -> Unit:
        """Return the unit itself."""
        return Unit(name, int(name.partition(".")[0]), tuple(self.modules), self.rows, self.columns)

    @property
    def option(self) -> Option:
        """Bits and sparsity."""
        return Option(self.bits, self.sparsity)


class LayerwisePolicy(Document):
    """Bits and sparsity of every unit.

    Attributes:
        version: Of this document.
        fingerprint: Of the model; None: unknown.
        sensitivity: By which units were scored.
        allocation: By which options were given.
        group_size: Inputs that share a scale; -1: all of a row.
        symmetric: Whether there are no zero points.
        divergence: Nats per token of KL divergence from the dense model on the calibration data, rounded to nearest and
            with Wanda's zeros; ``None``: not measured.
        units: By name, in the model's order.
    """

    what: ClassVar[str] = "a layer-wise policy"

    version: Literal[1] = 1
    fingerprint: str | None = None
    sensitivity: str
    allocation: str
    group_size: int
    symmetric: bool
    divergence: float | None = None
    units: dict[str, UnitPolicy]

    @property
    def grid(self) -> Grid:
        """To round to."""
        return Grid(self.group_size, self.symmetric)

    @property
    def average_bits(self) -> float:
        """Bits per weight, scales and zero points counted."""
        return self._average(lambda unit, option: self.grid.counted(option.bits, unit))

    @property
    def average_sparsity(self) -> float:
        """Share of zeros of all weights of units."""
        return self._average(lambda unit, option: counted_sparsity(option, unit))

    @property
    def notes(self) -> list[str]:
        """What to know of it, in sentences."""
        low = sorted({each.bits for each in self.units.values()} & set(READ))
        told = []
        if low:
            told.append(
                f"weights of {' and '.join(map(str, low))} bits are read by transformers only: no engine is known to "
                "serve them"
            )
        if any(each.sparsity for each in self.units.values()):
            told.append("zeros that follow no pattern make nothing faster or smaller: no engine uses them")
        return told

    @property
    def in_words(self) -> str:
        """Averages, and what was measured."""
        zeros = f", {self.average_sparsity:.1%} of them zero" if self.average_sparsity else ""
        lost = f"; {self.divergence:.4g} nats of KL per token" if self.divergence is not None else ""
        return f"{self.average_bits:.4g} bits per weight{zeros}{lost}"

    def require_of(self, units: Sequence[Unit], what: str = "the policy") -> None:
        """Refuse a policy of other units.

        Args:
            units: Of the model.
            what: The policy, for the message.

        Raises:
            ArtifactError: Naming the first differences.
        """
        mine = {name: (each.rows, each.columns, tuple(each.modules)) for name, each in self.units.items()}
        theirs = {unit.name: (unit.rows, unit.columns, unit.modules) for unit in units}
        if mine == theirs:
            return
        other = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        named = ", ".join(other[:SHOWN]) + ", ..." * (len(other) > SHOWN)
        raise ArtifactError(
            f"{what} is of another model: it has {len(mine)} units of linears and the model {len(theirs)}, and they "
            f"differ in {named}; make a policy of this model (amoeba policy MODEL)"
        )

    def require_within(self, average_bits: float | None, average_sparsity: float) -> None:
        """See to it that the averages achieved are those asked for.

        Raises:
            ArtifactError: If they are not.
        """
        slack = 1e-6
        most = average_bits if average_bits is not None else float("inf")
        if self.average_bits > most + slack or self.average_sparsity < average_sparsity - slack:
            raise ArtifactError(
                f"the policy has {self.in_words}, and at most {most} bits and a sparsity of {average_sparsity} or more "
                "were asked for"
            )

    def _average(self, of: Counted) -> float:
        units = [(each.unit(name), each.option) for name, each in self.units.items()]
        return sum(unit.weights * of(unit, option) for unit, option in units) / sum(unit.weights for unit, _ in units)


def option_name(option: Option) -> str:
    """Return the name of an option that is one thing alone.

    >>> option_name(Option(4)), option_name(Option(16, 0.5))
    ('4 bits', 'sparsity 0.5')
    """
    return f"sparsity {option.sparsity:g}" if option.sparsity else f"{option.bits} bits"
