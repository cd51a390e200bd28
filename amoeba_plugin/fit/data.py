"""One text in three parts, of which none is in another: to select and train on, to judge shapes on, to report on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amoeba_plugin.data.bars import MANY, without_bars
from amoeba_plugin.data.text import read_text
from amoeba_plugin.errors import DataError
from amoeba_plugin.runtime.files import whole_or_nothing

TRAIN, JUDGE, REPORT = "train", "judge", "report"
EVERY, MOST = 10, 2000  # of ten rows one is judged on and one reported on, and of each no more than so many
FEW_ROWS, PIECE = 100, 2000  # texts, below which they are taken in pieces of so many characters


def part_text(dataset: str, split: str, text_column: str | None, directory: Path) -> dict[str, Path]:
    """Write the parts of a data set, each as ``save_to_disk`` does, whole or not at all; those that are there stay.

    Of ten rows in a row the fifth is judged on and the tenth reported on. A few long texts are taken for as many rows
    as they have pieces, which end with a line.

    Args:
        dataset: File, ``save_to_disk`` directory, or hub id.
        split: Of the data set.
        text_column: Column with the text; ``None``: ``text``, or the only column of strings.
        directory: Of the parts.

    Returns:
        The parts by name.

    Raises:
        DataError: If the data set cannot be read, or is too small to be parted.
    """
    parts = {name: directory / name for name in (TRAIN, JUDGE, REPORT)}
    if directory.is_dir():
        return parts
    rows, column = read_text(dataset, split, text_column)
    if column is not None:
        rows = rows.select_columns([column])
        if len(rows) < FEW_ROWS:
            rows = _pieces(rows, column)
    if len(rows) < 3 * EVERY:
        raise DataError(
            f"data set {dataset} has {len(rows)} rows or pieces of {PIECE} characters, too few to be parted into text "
            f"to train, to judge and to report on; give {3 * EVERY} or more"
        )
    held_out = {JUDGE: range(EVERY // 2 - 1, len(rows), EVERY), REPORT: range(EVERY - 1, len(rows), EVERY)}
    taken = {index for indices in held_out.values() for index in indices}
    chosen = {name: list(indices)[:MOST] for name, indices in held_out.items()}
    chosen[TRAIN] = [index for index in range(len(rows)) if index not in taken]
    with whole_or_nothing(directory) as partial:
        for name, indices in chosen.items():
            with without_bars(len(indices) < MANY):
                rows.select(indices).save_to_disk(partial / name)
    return parts


def _pieces(rows: Any, column: str) -> Any:
    from datasets import Dataset

    pieces: list[str] = []
    for text in rows[column]:
        piece = ""
        for line in (text or "").splitlines(keepends=True):
            piece += line
            if len(piece) >= PIECE:
                pieces.append(piece)
                piece = ""
        pieces += [piece] if piece.strip() else []
    return Dataset.from_dict({column: pieces})
