"""Rows of tokens to micro-batches for training: padding, and the check that there is something to learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amoeba_plugin.data.batch import IGNORED
from amoeba_plugin.data.tokens import TOKEN_COLUMNS, require_numbers, require_tokens
from amoeba_plugin.errors import DataError


@dataclass(frozen=True)
class PaddingCollator:
    """Stack rows of token ids, padding the shorter ones on the right.

    Attributes:
        pad_token_id: Nothing attends to it.
        vocab_size: Tokens of the model; None: unknown, and not checked.

    >>> collate = PaddingCollator(pad_token_id=0)
    >>> batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6, 7], [8, 0, 0]], [[-100, 6, 7], [8, -100, -100]], [[1, 1, 1], [1, 0, 0]])
    """

    pad_token_id: int = 0
    vocab_size: int | None = None

    @classmethod
    def of(cls, config: Any) -> PaddingCollator:
        """Return one for a model, which pads with its own padding token."""
        return cls.padding_with(getattr(config, "pad_token_id", None), config.vocab_size)

    @classmethod
    def padding_with(cls, pad_token_id: Any, vocab_size: int) -> PaddingCollator:
        """Return one that pads with a token if the model has it; with 0 else: nothing attends to it."""
        return cls(pad_token_id if isinstance(pad_token_id, int) and 0 <= pad_token_id < vocab_size else 0, vocab_size)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return tensors (rows, longest row) int64; an ``attention_mask`` is added where lengths differ.

        Not to rows with ``position_ids``: with a mask, transformers takes documents packed into a row for one. Each
        token of padding, at position 0, is then a document of its own, which no other token sees.

        Raises:
            DataError: If a row has no tokens, tokens that are no whole numbers or not the model's, other columns than
                the first one, a column of another length than its tokens, or both packed documents and an
                ``attention_mask``.
        """
        bare = next((row for row in rows if "input_ids" not in row), None)
        if bare is not None:
            have = ", ".join(bare) or "columns that no model takes"
            raise DataError(f"a row has no input_ids, only {have}; tokenise the data set")
        lengths = {len(row["input_ids"]) for row in rows}
        if 0 in lengths:
            raise DataError("a row has no token in its input_ids; leave empty rows out of the data set")
        packed = any("position_ids" in row for row in rows)
        if any("attention_mask" in row for row in rows) or (len(lengths) > 1 and not packed):
            rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        for row in rows:
            _require_aligned(row, rows[0])
        fill = {"labels": IGNORED, "input_ids": self.pad_token_id}
        longest = max(lengths)
        columns = {name: [self._tensor(row[name], name, at) for at, row in enumerate(rows)] for name in rows[0]}
        return {
            name: torch.stack([_pad(each, longest, fill.get(name, 0)) for each in column])
            for name, column in columns.items()
        }

    def _tensor(self, values: Any, name: str, at: int) -> Tensor:
        if name in TOKEN_COLUMNS:
            return require_tokens(values, name, f"row {at} of a batch", self.vocab_size)
        return require_numbers(values, name, f"row {at} of a batch")


def require_targets(dataset: object) -> None:
    """Refuse a data set without a single target token; stops reading at the first one.

    What cannot be told from the rows passes: a stream, or rows whose labels the collator makes.

    Raises:
        DataError: If the data set is empty, or no row has a label after its first token, which nothing predicts; or if
            labels are no tokens.
    """
    if not isinstance(dataset, Sized) or not isinstance(dataset, Iterable):
        return
    if len(dataset) == 0:
        raise DataError("the training data set is empty; give at least one row of tokens")
    for number, row in enumerate(dataset):
        if not isinstance(row, Mapping) or "labels" not in row:
            return
        if bool((require_tokens(row["labels"], "labels", f"training row {number}")[..., 1:] != IGNORED).any()):
            return
    raise DataError(
        f"none of the {len(dataset)} training rows has a target token: all labels are {IGNORED}; "
        "give the tokens to be predicted their own id as label"
    )


def _require_aligned(row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    if row.keys() != first.keys():
        raise DataError(f"a row has {', '.join(row)}, another {', '.join(first)}; give all rows the same columns")
    if "attention_mask" in row and bool((torch.as_tensor(row.get("position_ids", ()))[1:] == 0).any()):
        raise DataError(
            "a row has packed documents (its position_ids start again) and an attention_mask, with which transformers "
            "takes it for one document; leave the attention_mask out"
        )
    for name, values in row.items():
        found = _length(values)
        if found != len(row["input_ids"]):
            raise DataError(
                f"a row has {len(row['input_ids'])} input_ids and {'no list of' if found is None else found} {name}; "
                "give one of each per token, label -100 where nothing is to be predicted"
            )


def _length(values: Any) -> int | None:
    try:
        return len(values)
    except TypeError:  # a number, or a tensor that is one
        return None


def _pad(values: Tensor, length: int, fill: int) -> Tensor:
    return functional.pad(values, (0, length - len(values)), value=fill)
