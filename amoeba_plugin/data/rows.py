"""Rows of a data set that are tokens already: which are drawn, whether they can be, and how they become batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from amoeba_plugin.data.batch import SEQUENCE_COLUMNS, Batch
from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.data.tokens import TOKEN_COLUMNS, require_numbers, require_tokens
from amoeba_plugin.errors import DataError

logger = logging.getLogger(__name__)


def tokenised_rows(
    rows: Any, num_samples: int, length: int, rng: random.Random, where: str, vocab_size: int
) -> list[dict[str, Any]]:
    """Draw rows of tokens: those of multiple choice by whole questions, of others no empty ones, cut at the end.

    Args:
        rows: A split of a data set, with ``input_ids``.
        num_samples: Rows; fewer where there are no more.
        length: Tokens that are kept of a row which is no choice.
        rng: What is drawn with.
        where: Names the data set, for messages.
        vocab_size: Tokens of the model.

    Raises:
        DataError: If all are empty, or one has what is no token of the model.
    """
    if "question" in rows.column_names:
        return [
            _checked(rows[index], where, index, vocab_size) for index in _whole_questions(rows, num_samples, rng, where)
        ]
    drawn = rng.sample(range(len(rows)), min(num_samples, len(rows)))
    taken = set(drawn)
    others = (index for index in range(len(rows)) if index not in taken)  # in place of empty ones
    chosen: list[dict[str, Any]] = []
    read = 0
    for index in chain(drawn, others):
        if len(chosen) == num_samples:
            break
        row, read = _checked(rows[index], where, index, vocab_size), read + 1
        if len(row["input_ids"]):
            chosen.append({name: value[:length] if name in SEQUENCE_COLUMNS else value for name, value in row.items()})
    if not chosen:
        raise DataError(f"{where}: no row has a token in its input_ids; give rows of tokens, or text")
    tell_empty(where, read - len(chosen), read)
    return chosen


def tell_empty(what: str, empty: int, read: int) -> None:
    """Log how many texts or rows were skipped, if any."""
    if empty:
        logger.warning("%s: %d of the %d rows read are empty and were skipped", what, empty, read)


def collated(rows: Sequence[Mapping[str, Any]], collate: PaddingCollator) -> Batch:
    """Return rows of tokens as one batch, with their numeric columns."""
    sequences = [name for name in SEQUENCE_COLUMNS if name in rows[0]]
    batch = collate([{name: row[name] for name in sequences} for row in rows])
    scalars = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    return batch | {name: torch.tensor([row[name] for row in rows]) for name in scalars}


def _checked(row: dict[str, Any], where: str, index: int, vocab_size: int) -> dict[str, Any]:
    place = f"{where}, row {index}"
    for name in SEQUENCE_COLUMNS:
        if name not in row:
            continue
        if name in TOKEN_COLUMNS:
            column = require_tokens(row[name], name, place, vocab_size)
        else:
            column = require_numbers(row[name], name, place)
        if column.dim() != 1:
            raise DataError(f"{place}: {name} is no list; give one number per token")
    return row


def _whole_questions(rows: Any, num_samples: int, rng: random.Random, where: str) -> list[int]:
    groups: dict[int, list[int]] = {}
    for index, question in enumerate(rows["question"]):
        if not isinstance(question, int):
            raise DataError(
                f"{where}, row {index}: the column question holds {question!r}; beside input_ids it numbers the "
                "questions whose choices the rows are: give whole numbers, or leave the column out"
            )
        groups.setdefault(question, []).append(index)
    shuffled = rng.sample(list(groups.values()), len(groups))
    indices: list[int] = []
    for group in shuffled:
        if indices and len(indices) + len(group) > num_samples:
            break
        indices.extend(group)
    return indices
