"""A device's budget: an engine at a scheme or at several, and what may not be exceeded there, with units."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any

from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.errors import BudgetError, DeploymentError, did_you_mean
from amoeba_plugin.runtime.units import BYTES

SECONDS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6")}
UNITS = {"prefill": SECONDS, "decode": SECONDS, "load": SECONDS, "memory": BYTES, "file": BYTES}
SHOWN = {"prefill": "ms", "decode": "ms", "load": "ms", "memory": "MB", "file": "MB"}
LIMIT = re.compile(r"([a-z]+)(?:\[([0-9]{1,7})\])?<=([0-9]{1,12}(?:\.[0-9]{1,12})?)([A-Za-z]*)")
SEPARATOR = ","  # of points
EXAMPLE = "llama-cpp:Q4_0 decode<=12ms prefill[256]<=200ms memory<=300MB"


class Verdict(Enum):
    """Whether costs keep a budget: beyond their intervals, or a measurement must tell."""

    KEEPS = "keeps"
    EXCEEDS = "exceeds"
    UNSURE = "unsure"


@dataclass(frozen=True)
class Limit:
    """The most that something may cost.

    Attributes:
        kind: "prefill", "decode" and "load" (seconds), "memory" and "file" (bytes).
        most: In seconds or bytes.
        tokens: Of the prompt; 0 where it does not matter.
    """

    kind: str
    most: float
    tokens: int = 0

    @property
    def name(self) -> str:
        """As a budget names it: ``prefill[256]``."""
        return f"{self.kind}[{self.tokens}]" if self.tokens else self.kind

    @property
    def unit(self) -> tuple[str, float]:
        """What it is shown in, and how many seconds or bytes that is."""
        name = SHOWN[self.kind]
        return name, float(UNITS[self.kind][name])

    def __str__(self) -> str:
        return f"{self.name}<={self.in_unit(self.most)}"

    def in_unit(self, cost: float) -> str:
        """Return a cost of this kind for people.

        >>> Limit("decode", 0.012).in_unit(0.0141)
        '14.1ms'
        """
        name, size = self.unit
        return f"{cost / size:.6g}{name}"

    def verdict(self, cost: Prediction) -> Verdict:
        """Tell whether a cost keeps it."""
        if cost.measured:
            return Verdict.KEEPS if cost.value <= self.most else Verdict.EXCEEDS
        if cost.high <= self.most:
            return Verdict.KEEPS
        return Verdict.EXCEEDS if cost.low > self.most else Verdict.UNSURE


@dataclass(frozen=True)
class Budget:
    """Limits that hold in each of some flows at their schemes.

    Attributes:
        points: Flows at schemes that may be chosen, one at least.
        limits: What may not be exceeded in any of them.
    """

    points: tuple[Point, ...]
    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget.

        >>> str(Budget.parse("torch:fp32 prefill[256]<=0.2s memory<=300MB"))
        'torch:fp32 prefill[256]<=200ms memory<=300MB'
        >>> [str(point) for point in Budget.parse("llama-cpp:Q8_0,Q4_0 decode<=12ms").points]
        ['llama-cpp:Q8_0', 'llama-cpp:Q4_0']

        Raises:
            BudgetError: If it is none, a unit is missing or wrong, or two limits are about the same.
        """
        points, *limits = text.split() or [""]
        return cls._of(points, [_limit(each) for each in limits], text)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Budget:
        """Read what a recipe says: ``{flow: "llama-cpp:Q4_0", decode: 12ms, "prefill[256]": 200ms}``; several flows are
        a list, or separated by commas.

        Raises:
            BudgetError: As :meth:`parse`.
        """
        if "flow" not in fields:
            raise BudgetError(f"budget {dict(fields)} names no flow; write flow: llama-cpp:Q4_0")
        limits = [_limit(f"{name}<={value}") for name, value in fields.items() if name != "flow"]
        flow = fields["flow"]
        points = SEPARATOR.join(map(str, flow)) if isinstance(flow, list | tuple) else str(flow)
        return cls._of(points, limits, str(dict(fields)))

    @classmethod
    def _of(cls, points: str, limits: Sequence[Limit], said: str) -> Budget:
        try:
            parsed = _points(points)
        except DeploymentError as error:
            raise BudgetError(f"budget '{said}': {error}; a budget is written like {EXAMPLE}") from error
        if not limits:
            raise BudgetError(f"budget '{said}' limits nothing; a budget is written like {EXAMPLE}")
        for names in ([limit.name for limit in limits], list(map(str, parsed))):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise BudgetError(f"budget '{said}' names {twice} twice; keep one of the two")
        return cls(parsed, tuple(limits))

    def __str__(self) -> str:
        written, flow = [], None
        for point in self.points:
            written.append(point.scheme if point.flow == flow else str(point))
            flow = point.flow
        return " ".join([SEPARATOR.join(written), *map(str, self.limits)])

    def verdict(self, costs: Mapping[Limit, Prediction]) -> Verdict:
        """Tell whether costs keep every limit."""
        verdicts = {limit.verdict(costs[limit]) for limit in self.limits}
        if Verdict.EXCEEDS in verdicts:
            return Verdict.EXCEEDS
        return Verdict.UNSURE if Verdict.UNSURE in verdicts else Verdict.KEEPS


def _points(text: str) -> tuple[Point, ...]:
    """Read points; one that names a scheme alone is of the flow in front of it."""
    found: list[Point] = []
    for part in text.split(SEPARATOR):
        named = found and part.strip() and ":" not in part
        found.append(Point(found[-1].flow, part.strip()) if named else Point.parse(part))
    return tuple(found)


def _limit(text: str) -> Limit:
    found = LIMIT.fullmatch(text)
    if found is None:
        raise BudgetError(f"'{text}' limits nothing; write KIND<=NUMBER and a unit, such as decode<=12ms")
    kind, tokens, number, unit = found.groups()
    if kind not in UNITS:
        raise BudgetError(
            f"'{text}': there is no cost '{kind}'.{did_you_mean(kind, UNITS)} There are {', '.join(UNITS)}"
        )
    if unit not in UNITS[kind]:
        what = f"'{unit}' is no unit of it" if unit else "the unit is missing"
        raise BudgetError(f"'{text}': {what}; {kind} is in {', '.join(UNITS[kind])}")
    if (kind == "prefill") != (tokens is not None):
        raise BudgetError(
            f"'{text}': how long a prompt? write prefill[256]<={number}{unit}" if kind == "prefill"
            else f"'{text}': only prefill has a length; write {kind}<={number}{unit}"
        )  # fmt: skip
    most = float(Decimal(number) * UNITS[kind][unit])
    if most <= 0 or (tokens is not None and int(tokens) < 1):
        raise BudgetError(f"'{text}': nothing costs as little as that; write a number above 0")
    return Limit(kind, most, int(tokens or 0))
