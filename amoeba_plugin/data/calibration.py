"""Calibration data, drawn once, so that everything sees the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amoeba_plugin.data.batch import IGNORED, SEQUENCE_COLUMNS, Batch, target_counts
from amoeba_plugin.data.tokens import TOKEN_COLUMNS, require_numbers, require_tokens
from amoeba_plugin.errors import DataError

logger = logging.getLogger(__name__)
# What shortens whatever runs over it; the options are those of `amoeba run`.
LESS_DATA = "less calibration data (--num-calibration-samples, --max-seq-length)"


def materialise(
    loader: Iterable[Mapping[str, Any]] | None,
    device: torch.device | str | None = None,
    vocab_size: int | None = None,
) -> list[Batch]:
    """Draw all batches of a loader once, so that everything that follows sees the same data.

    Args:
        loader: Yields mappings with ``input_ids`` (batch, positions); columns that are not numbers are left out.
        device: Where to put the tensors; default: where they are.
        vocab_size: Tokens of the model that the data is for; default: unknown, and not checked.

    Returns:
        Batches with ``input_ids``, ``attention_mask`` (default: ones), ``labels`` (default: ``input_ids``, -100 on
        padding), and whatever other numeric columns there are.

    Raises:
        DataError: If there is no data, no ``input_ids``, or columns that do not align with them; if tokens are no whole
            numbers, or not the model's; or if there is nothing to predict because every sequence is too short.
    """
    if loader is None:
        raise DataError(
            "there is no calibration data: selection measures the model on text; pass dataset=... (--dataset)"
        )
    batches = [_complete(batch, number, device, vocab_size) for number, batch in enumerate(loader)]
    if not batches:
        raise DataError("the calibration data is empty; pass a data set with rows, and num_calibration_samples above 0")
    if not any(int(target_counts(batch).sum()) for batch in batches):
        longest = max(int(batch["attention_mask"].sum(dim=1).max()) for batch in batches)
        raise DataError(
            f"the calibration data is too short: nothing to predict in {len(batches)} batches, whose longest "
            f"sequence has {longest} token(s); pass texts of two tokens or more (a few hundred are usual) with labels"
        )
    _tell_single_tokens(batches)
    return batches


def _tell_single_tokens(batches: Sequence[Batch]) -> None:
    lengths = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches])
    short = int((lengths < 2).sum())
    if short:
        logger.warning(
            "%d of %d calibration sequences have one token or none: nothing can be predicted in them, so that only "
            "statistics of activations see them; leave them out, or join texts",
            short,
            len(lengths),
        )


def _complete(
    given: Mapping[str, Any], number: int, device: torch.device | str | None, vocab_size: int | None
) -> Batch:
    where = f"calibration batch {number}"
    batch = {
        name: tensor.detach().to(device)
        for name, value in given.items()
        if (tensor := _as_tensor(value, name, where, vocab_size)) is not None
    }
    if "input_ids" not in batch:
        raise DataError(
            f"calibration batch {number} has no input_ids, only {', '.join(given) or 'nothing'}; tokenise the data set"
        )
    ids = batch["input_ids"]
    if ids.dim() != 2:
        raise DataError(
            f"input_ids of calibration batch {number} have shape {tuple(ids.shape)}; (batch, positions) is wanted"
        )
    for name in SEQUENCE_COLUMNS:
        if name in batch and batch[name].shape != ids.shape:
            raise DataError(
                f"calibration batch {number} has input_ids {tuple(ids.shape)} and {name} {tuple(batch[name].shape)}; "
                "give one value per token"
            )
    mask = batch.setdefault("attention_mask", torch.ones_like(ids))
    if "labels" not in batch:
        labels = ids.masked_fill(mask == 0, IGNORED)
        # After left padding, the first token would be predicted from a padded position.
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)
        batch["labels"] = labels
    return batch


def _as_tensor(value: Any, name: str, where: str, vocab_size: int | None) -> Tensor | None:
    if name in TOKEN_COLUMNS:
        return require_tokens(value, name, where, vocab_size)
    try:
        return require_numbers(value, name, where)
    except DataError:
        if name in SEQUENCE_COLUMNS:
            raise
        return None


def require_disjoint(selection: Sequence[Batch], reported: Sequence[Batch]) -> None:
    """Refuse to report figures on rows that something was selected on.

    Raises:
        DataError: If a row of tokens, padding aside, is in both.
    """
    seen = set(_rows_of_tokens(selection))
    shared = [row for row in _rows_of_tokens(reported) if row in seen]
    if shared:
        raise DataError(
            f"{len(shared)} of the rows to report on are among those that selection saw, so that the figure would "
            "flatter it; report on another split, or on other rows of it"
        )


def _rows_of_tokens(batches: Sequence[Batch]) -> Iterator[tuple[int, ...]]:
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            yield tuple(ids[mask].tolist())
