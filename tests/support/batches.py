"""Random batches, rows and datasets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor

from support.models import VOCABULARY


def make_random_batches(
    count: int = 3, rows: int = 2, positions: int = 12, seed: int = 0, lengths: Sequence[int] = ()
) -> list[dict[str, Tensor]]:
    """Return complete batches of random tokens.

    ``lengths`` are those of the rows of every batch, padded on the right; default: all ``positions``.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, positions, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, positions), generator=generator)
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids * mask, "attention_mask": mask.clone(), "labels": labels})
    return batches


def make_questions(batches: list[dict[str, Tensor]], choices: int, continuation: int = 4) -> list[dict[str, Tensor]]:
    """Turn random batches into questions of ``choices`` rows each, in place; which choice is the answer differs."""
    number = 0
    for batch in batches:
        rows = len(batch["input_ids"])
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, : batch["labels"].shape[1] - continuation] = -100
        indices = torch.arange(number, number + rows)
        batch["question"] = indices // choices + 10
        batch["is_answer"] = (indices % choices == (indices // choices) % choices).long()
        number += rows
    return batches


def make_rows(
    count: int = 16, targets: int | Sequence[int] = 5, length: int = 12, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Return rows of ``tiny_llama``'s tokens whose last ``targets`` are the response; one number, or each row's own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(61, (count, length), generator=generator).tolist()
    numbers = [targets] * count if isinstance(targets, int) else targets
    return [
        {"input_ids": row, "labels": [-100] * (length - number) + row[length - number :]}
        for row, number in zip(tokens, numbers, strict=True)
    ]


def tensor_rows() -> list[dict[str, Tensor]]:
    """Return eight rows of 12 tokens as tensors, with a mask, the first four tokens no targets."""
    tokens = torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[:, :4] = -100
    mask = torch.ones(12, dtype=torch.int64)
    return [
        {"input_ids": row, "attention_mask": mask, "labels": label} for row, label in zip(tokens, labels, strict=True)
    ]


def token_dataset(seed: int = 5) -> Dataset:
    """Return eight rows of 16 random tokens, none of them special, as a recipe's data."""
    rows = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 16} for row in rows])
