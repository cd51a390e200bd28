"""How numbers are written where people read them."""

from __future__ import annotations

NO_BREAK = "\N{NO-BREAK SPACE}"


def number(value: float | None, digits: int = 2) -> str:
    """Write a number with a fixed count of decimals, a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"  # noqa: RUF001  # a dash, as tables have it


def percent(value: float | None) -> str:
    """Write a share in whole percent, a dash where there is none."""
    return "–" if value is None else f"{100 * value:.0f}{NO_BREAK}%"  # noqa: RUF001


def millions(count: int) -> str:
    """Write a count of parameters in millions or billions.

    >>> print(millions(3_540_000), millions(6_700_000_000))  # with no-break spaces
    3.54 M 6.70 B
    """
    return f"{count / 1e9:.2f}{NO_BREAK}B" if count >= 1e9 else f"{count / 1e6:.2f}{NO_BREAK}M"


def size(count: int) -> str:
    """Write a number of bytes in decimal units.

    >>> print(size(7_100_000), size(13_500_000_000))  # with no-break spaces
    7.10 MB 13.50 GB
    """
    return f"{count / 1e9:.2f}{NO_BREAK}GB" if count >= 1e9 else f"{count / 1e6:.2f}{NO_BREAK}MB"
