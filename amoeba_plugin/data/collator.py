"""Rows of tokens to micro-batches for training: padding, and the check that there is something to learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amoeba_plugin.data.batch import IGNORED
from amoeba_plugin.errors import DataError


@dataclass(frozen=True)
class PaddingCollator:
    """Stack rows of token ids, padding the shorter ones on the right.

    >>> collate = PaddingCollator(pad_token_id=0)
    >>> batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6, 7], [8, 0, 0]], [[-100, 6, 7], [8, -100, -100]], [[1, 1, 1], [1, 0, 0]])
    """

    pad_token_id: int = 0

    @classmethod
    def of(cls, config: Any) -> PaddingCollator:
        """Return one that pads with a model's own padding token; with 0 where it has none: nothing attends to it."""
        pad = getattr(config, "pad_token_id", None)
        return cls(pad if isinstance(pad, int) and pad >= 0 else 0)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return tensors (rows, longest row) int64; an ``attention_mask`` is added where lengths differ.

        Not to rows with ``position_ids``: with a mask, transformers takes documents packed into a row for one. Each
        token of padding, at position 0, is then a document of its own, which no other token sees.

        Raises:
            DataError: If a row has no tokens, other columns than the first one, a column of another length than its
                tokens, or both packed documents and an ``attention_mask``.
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
        return {
            name: torch.stack([_pad(row[name], max(lengths), fill.get(name, 0)) for row in rows]) for name in rows[0]
        }


def require_targets(dataset: object) -> None:
    """Refuse a data set without a single target token; stops reading at the first one.

    What cannot be told from the rows passes: a stream, or rows whose labels the collator makes.

    Raises:
        DataError: If the data set is empty, or no row has a label after its first token, which nothing predicts.
    """
    if not isinstance(dataset, Sized) or not isinstance(dataset, Iterable):
        return
    if len(dataset) == 0:
        raise DataError("the training data set is empty; give at least one row of tokens")
    for row in dataset:
        if not isinstance(row, Mapping) or "labels" not in row:
            return
        if bool((torch.as_tensor(row["labels"])[..., 1:] != IGNORED).any()):
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


def _pad(values: Any, length: int, fill: int) -> Tensor:
    tensor = torch.as_tensor(values)
    return torch.nn.functional.pad(tensor, (0, length - len(tensor)), value=fill)
