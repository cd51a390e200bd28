"""A multiple-choice task made of held-out text: which of four continuations follows this context?

The true continuation is the text's own; the other three come from other held-out modules. A model that knows nothing
of the context is right in 25 % of the questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.demo.corpus import SourceFile

CHOICES = 4
CONTEXT_TOKENS = 64
CONTINUATION_TOKENS = 24


def multiple_choice(
    files: Sequence[SourceFile], tokenizer: PreTrainedTokenizerBase, questions: int, seed: int, batch_size: int = 16
) -> list[Batch]:
    """Return questions about held-out text, as batches; every question has ``CHOICES`` rows, the true one first.

    Args:
        files: Held-out sources of at least ``CHOICES`` modules.
        tokenizer: Its BOS starts every row.
        questions: How many to ask.
        seed: Same seed, same questions.
        batch_size: Rows, that is choices, per batch.

    Returns:
        Batches of ``input_ids``, ``attention_mask``, ``labels`` (-100 outside the continuation), each (batch, 1 +
        context + continuation), and ``question``, ``is_answer``, each (batch,): what the objective ``accuracy`` asks
        for.
    """
    rng = random.Random(seed)
    length = CONTEXT_TOKENS + CONTINUATION_TOKENS
    encoded = [(file.module, tokenizer(file.text, add_special_tokens=False)["input_ids"]) for file in files]
    usable = [(module, ids) for module, ids in encoded if len(ids) > 2 * length]
    rows = []
    for question in range(questions):
        module, ids = rng.choice(usable)
        start = rng.randrange(len(ids) - length)
        context, answer = ids[start : start + CONTEXT_TOKENS], ids[start + CONTEXT_TOKENS : start + length]
        elsewhere = [_piece(rng, [other for name, other in usable if name != module]) for _ in range(CHOICES - 1)]
        for choice, continuation in enumerate([answer, *elsewhere]):
            ids_row = [tokenizer.bos_token_id, *context, *continuation]
            rows.append((ids_row, [-100] * (1 + CONTEXT_TOKENS) + continuation, question, int(choice == 0)))
    return [_batch(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _piece(rng: random.Random, texts: Sequence[list[int]]) -> list[int]:
    ids = rng.choice(texts)
    start = rng.randrange(len(ids) - CONTINUATION_TOKENS)
    return ids[start : start + CONTINUATION_TOKENS]


def _batch(rows: Sequence[tuple[list[int], list[int], int, int]]) -> Batch:
    ids, labels, question, is_answer = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "question": question,
        "is_answer": is_answer,
    }
