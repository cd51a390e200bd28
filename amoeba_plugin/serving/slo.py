"""What a request asks of time: to the first token, for each token behind it, or for everything together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amoeba_plugin.errors import SloError, did_you_mean

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
TARGET = re.compile(r"(ttft|tpot|total)<=([0-9]{1,9}(?:\.[0-9]{1,9})?)(s|ms|us|%)?", re.ASCII)
FIELDS = {"ttft": "", "tpot": "", "ttft_ms": "ms", "tpot_ms": "ms", "total_ms": "ms"}  # a share has no unit
EXAMPLE = "ttft<=200ms tpot<=20ms, ttft<=60% tpot<=80%, or total<=2s"


@dataclass(frozen=True)
class Latency:
    """Seconds of a shape: to the first token of a prompt, and for each token behind it."""

    ttft: float
    tpot: float

    def total(self, answer: int) -> float:
        """Return the seconds until an answer of so many tokens is there."""
        return self.ttft + max(answer - 1, 0) * self.tpot


@dataclass(frozen=True)
class Target:
    """An upper bound in seconds, or a share of what the whole model takes on the whole prompt (the paper's)."""

    amount: float
    is_share: bool = False

    def seconds(self, whole: float) -> float:
        """Return it in seconds.

        Args:
            whole: What the whole model takes.
        """
        return self.amount * whole if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{self.amount:.4g} of the whole model's" if self.is_share else f"{self.amount * 1e3:.4g} ms"


@dataclass(frozen=True)
class Slo:
    """A request's targets; what is not named may take as long as it likes.

    Attributes:
        ttft: For the first token, from when the request came.
        tpot: For each token behind it, in the mean.
        total: For everything, in seconds; stands alone.
    """

    ttft: Target | None = None
    tpot: Target | None = None
    total: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read targets as they are written.

        >>> Slo.parse("ttft<=60% tpot<=20ms")
        Slo(ttft=Target(amount=0.6, is_share=True), tpot=Target(amount=0.02, is_share=False), total=None)
        >>> Slo.parse("total<=2s").total
        2.0

        Raises:
            SloError: If the text is anything else, or two targets contradict each other.
        """
        found: dict[str, Target] = {}
        for word in text.split():
            match = TARGET.fullmatch(word)
            if match is None:
                raise SloError(f"'{word}' is no target for time; write {EXAMPLE}")
            name, number, unit = match.groups()
            if name in found:
                raise SloError(f"targets '{text}' name {name} twice; keep one of the two")
            found[name] = _target(name, float(number) / (100 if unit == "%" else 1), "" if unit == "%" else unit or "")
        return cls._of(found, text)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Slo:
        """Read the fields of a request: ``ttft`` and ``tpot`` are shares, ``ttft_ms``, ``tpot_ms`` and ``total_ms``
        milliseconds.

        >>> Slo.of_fields({"ttft_ms": 200, "tpot": 0.8}).tpot
        Target(amount=0.8, is_share=True)

        Raises:
            SloError: If a field is unknown, or no number, or two contradict each other.
        """
        found: dict[str, Target] = {}
        for field, value in fields.items():
            if field not in FIELDS:
                raise SloError(
                    f"slo has no field '{field}'.{did_you_mean(field, FIELDS)} There are {', '.join(FIELDS)}"
                )
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SloError(f"slo: {field} is {value!r}, and must be a number")
            name = field.partition("_")[0]
            if name in found:
                raise SloError(f"slo names {name} as a share and in milliseconds; keep one of the two")
            found[name] = _target(name, float(value), FIELDS[field])
        return cls._of(found, str(dict(fields)))

    @classmethod
    def _of(cls, found: Mapping[str, Target], said: str) -> Slo:
        if "total" in found and len(found) > 1:
            raise SloError(f"targets {said} name the total beside its parts; keep the total alone, or the parts")
        total = found.get("total")
        return cls(found.get("ttft"), found.get("tpot"), None if total is None else total.amount)

    def __str__(self) -> str:
        named = {"ttft": self.ttft, "tpot": self.tpot, "total": None if self.total is None else Target(self.total)}
        return " ".join(f"{name} {target}" for name, target in named.items() if target is not None) or "none"

    def limits(self, whole: Latency) -> Limits:
        """Return the targets in seconds.

        Args:
            whole: Of the whole model on the whole prompt.
        """
        return Limits(
            math.inf if self.ttft is None else self.ttft.seconds(whole.ttft),
            math.inf if self.tpot is None else self.tpot.seconds(whole.tpot),
            math.inf if self.total is None else self.total,
        )


@dataclass(frozen=True)
class Limits:
    """Targets in seconds; infinite where there are none."""

    ttft: float = math.inf
    tpot: float = math.inf
    total: float = math.inf

    def behind(self, waited: float) -> Limits:
        """Return what is left once a request has waited so many seconds."""
        return Limits(self.ttft - waited, self.tpot, self.total - waited)

    def kept_by(self, latency: Latency, answer: int) -> bool:
        """Tell whether a latency keeps them for an answer of so many tokens."""
        return (
            within(latency.ttft, self.ttft)
            and within(latency.tpot, self.tpot)
            and within(latency.total(answer), self.total)
        )


def within(took: float, limit: float) -> bool:
    """Tell whether a time keeps a limit, but for the rounding of its sum."""
    return took <= limit or math.isclose(took, limit, rel_tol=1e-9)


def _target(name: str, number: float, unit: str) -> Target:
    if not math.isfinite(number) or number <= 0:
        raise SloError(f"a target for {name} is {number:g}, and must be above 0")
    if unit:
        return Target(number * SECONDS[unit])
    if name == "total":
        raise SloError(f"a target for total needs a unit: s, ms or us; {EXAMPLE}")
    if number > 1:
        raise SloError(
            f"a target for {name} of {number:g} without a unit is a share of the whole model's time, above 0 and at "
            f"most 1; in seconds write it with a unit: {EXAMPLE}"
        )
    return Target(number, is_share=True)
