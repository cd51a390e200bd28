"""Whether numbers are tokens of a model: of one that is none, an embedding says nothing that a user understands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amoeba_plugin.data.batch import IGNORED
from amoeba_plugin.errors import DataError

TOKEN_COLUMNS = ("input_ids", "labels")


def require_numbers(values: Any, column: str, where: str) -> Tensor:
    """Return a column as a tensor.

    Args:
        values: A tensor, or lists of numbers.
        column: Its name.
        where: The row or batch that has it, for messages.

    Raises:
        DataError: If they are no numbers, or lists of different lengths.
    """
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"{where}: {column} are no numbers, in lists of the same length: {_beginning(values)}; give one number per "
            "token"
        ) from error


def require_tokens(values: Any, column: str, where: str, vocab_size: int | None = None) -> Tensor:
    """Return a column of tokens as a tensor of its own shape, int64.

    Args:
        values: A tensor, or lists of numbers.
        column: "input_ids" or "labels"; labels may be -100, which is no target.
        where: The row or batch that has it, for messages.
        vocab_size: Tokens of the model; None: unknown.

    Raises:
        DataError: If they are no whole numbers, or none of the model's tokens.
    """
    tokens = require_numbers(values, column, where)
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        raise DataError(
            f"{where}: {column} are no whole numbers: {_beginning(values)}; give the ids of tokens, as the model's "
            "tokenizer returns them"
        )
    outside = tokens < 0
    if column == "labels":
        outside &= tokens != IGNORED
    if vocab_size is not None:
        outside |= tokens >= vocab_size
    if bool(outside.any()):
        first = outside.nonzero()[0].tolist()
        row = f", row {first[0]}" if len(first) > 1 else ""
        known = "none is below 0" if vocab_size is None else f"the model has 0 to {vocab_size - 1}"
        raise DataError(
            f"{where}{row}: {column} holds the token {int(tokens[tuple(first)])} at position {first[-1]}, and {known}; "
            "tokenise the data with this model's own tokenizer"
        )
    return tokens.long()


def _beginning(values: Any) -> str:
    return repr(values if isinstance(values, str) or not hasattr(values, "__getitem__") else values[:1])[:60]
