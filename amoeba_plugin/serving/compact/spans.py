"""From one tokenizer's tokens to another's, by the characters that they stand for."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.serving.detokenizer import Detokenizer

Span = tuple[int, int]  # the first character, and behind the last


def spans_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> tuple[str, list[Span]]:
    """Return the text of tokens, and the characters of each.

    Tokens that are a character only together have it each; special ones, and bytes that become none, are empty.

    Args:
        tokenizer: Of the tokens.
        tokens: Any, in any order.
    """
    detokenizer, special = Detokenizer(tokenizer), set(tokenizer.all_special_ids)
    spans: list[Span] = []
    waiting: list[int] = []  # positions of parts of a character
    for position, token in enumerate(tokens):
        before = detokenizer.length
        detokenizer.push(token)
        spans.append((before, before))
        waiting += [] if token in special else [position]
        if detokenizer.length > before:
            for each in waiting:
                spans[each] = (before, detokenizer.length)
            waiting = []
    before = detokenizer.length
    detokenizer.finish()
    for each in waiting:
        spans[each] = (before, detokenizer.length)
    return detokenizer.text, spans


def mapped(values: Tensor, held: Sequence[Span], spans: Sequence[Span]) -> Tensor:
    """Return values of some tokens for others of the same text, (tokens, size) of (held, size).

    Each gets the mean of all that share a character with it; where none does, between words, what the last one has that
    begins before it, or else the first. Of no tokens at all it is zeros.

    >>> mapped(torch.tensor([[1.0], [3.0]]), [(0, 2), (2, 4)], [(0, 1), (1, 3), (4, 5)])
    tensor([[1.],
            [2.],
            [3.]])

    Args:
        values: (held, size).
        held: Where the tokens that have values stand, ascending.
        spans: Where the others do.
    """
    if not held:
        return values.new_zeros(len(spans), values.shape[1])
    starts, ends = [start for start, _ in held], [end for _, end in held]
    found = []
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if last <= first or end <= start:
            first = max(bisect_left(starts, start) - 1, 0)
            last = first + 1
        found.append(values[first:last].mean(0))
    return torch.stack(found) if found else values.new_zeros(0, values.shape[1])
