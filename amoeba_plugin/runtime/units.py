"""Quantities with units, as people write them: 1GiB, 20min."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from amoeba_plugin.errors import BudgetError

BYTES = {
    "B": Decimal(1), "kB": Decimal(10**3), "MB": Decimal(10**6), "GB": Decimal(10**9), "KiB": Decimal(2**10),
    "MiB": Decimal(2**20), "GiB": Decimal(2**30),
}  # fmt: skip
DURATIONS = {"s": Decimal(1), "min": Decimal(60), "h": Decimal(3600)}
QUANTITY = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?) ?([A-Za-z]+)")


def quantity(text: str, units: Mapping[str, Decimal]) -> float:
    """Return a quantity in the unit that counts 1.

    >>> quantity("1.5GiB", BYTES), quantity("20 min", DURATIONS)
    (1610612736.0, 1200.0)

    Raises:
        BudgetError: If it is none, is 0, or has no unit of these.
    """
    found = QUANTITY.fullmatch(text.strip())
    if found is None or found[2] not in units or not Decimal(found[1]):
        raise BudgetError(f"'{text}' is no quantity here; give a number above 0 and one of {', '.join(units)}")
    return float(Decimal(found[1]) * units[found[2]])
