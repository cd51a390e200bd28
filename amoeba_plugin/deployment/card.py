"""The README of a deployed subnet: what it is, what its engine makes of it, and the commands that run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from amoeba_plugin._version import __version__
from amoeba_plugin.extraction.model_card import CARD_NAME
from amoeba_plugin.runtime.files import write_atomically


def write_deployed_card(
    directory: Path, title: str, checkpoint: Path, told: Mapping[str, str], ways: Sequence[tuple[str, str, str]]
) -> None:
    """Write the card.

    Args:
        directory: Of the export.
        title: What it is.
        checkpoint: That was exported, with the card that extraction wrote, whose facts are taken over.
        told: What is known beside them, by what it is called.
        ways: To run it: title, language and text of each.
    """
    rows = [*_facts(checkpoint), *(f"| {name} | {value} |" for name, value in told.items())]
    table = "\n".join(["| | |", "|---|---|", *rows])
    run = "".join(f"\n{title}:\n\n```{kind}\n{code.strip()}\n```\n" for title, kind, code in ways)
    text = f"# {title}\n\nDeployed by amoeba_plugin {__version__}.\n\n{table}\n\n## Run it\n{run}"
    write_atomically(directory / CARD_NAME, text.encode())


def _facts(checkpoint: Path) -> list[str]:
    """Return the rows of the table that extraction wrote."""
    card = checkpoint / CARD_NAME
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return [line for line in lines if line.startswith("| ") and not line.startswith(("| |", "| parity"))]
