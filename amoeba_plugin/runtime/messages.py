"""What commands say to people, beside what they print: on the standard error, in colours where there are any."""

from __future__ import annotations

from rich.console import Console


def say(message: str) -> None:
    """Print a sentence where errors go."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def done(message: str) -> None:
    """Print what came of a command."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="green", markup=False)


def warn(message: str) -> None:
    """Print a warning."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {message}", style="yellow", markup=False)


def refuse(message: str) -> None:
    """Print why a command did nothing."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="bold red", markup=False)
