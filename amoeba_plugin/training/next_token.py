"""The next token's loss: where a batch has one, and its sum over those positions, a chunk of logits at a time.

Logits at position t predict the token at t + 1. Losses are given by rows, so that whoever adds them up can walk through
the positions in chunks and take each chunk's gradient at once (:func:`sum_over_rows`): beside the logits and their
gradient, both in the logits' dtype, only one chunk lives in fp32. All are means over positions, in nats, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amoeba_plugin.data.batch import IGNORED

# Logits per chunk: 16 MiB in fp32; on a CPU 4 MiB, which stay in its caches and in memory that need not be mapped anew.
CHUNK_ELEMENTS = {"cpu": 2**20}
DEFAULT_CHUNK_ELEMENTS = 2**22

RowLoss = Callable[[Tensor, slice], Tensor]  # ((n, vocabulary) fp32 logits, their place among the rows) -> (n,) nats


@dataclass(frozen=True)
class Positions:
    """The positions of a micro-batch at which a loss is taken.

    >>> labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, 6, -100]])
    >>> positions = target_positions(labels)
    >>> positions.columns.tolist(), positions.rows.tolist(), positions.labels.tolist()
    ([0, 1, 2], [1, 2, 3, 4], [7, 8, 5, 6])
    """

    columns: Tensor  # (P,) int64: positions at which at least one sequence has a loss; logits are computed there only
    rows: Tensor  # (N,) int64: the positions with a loss, as indices into the (batch * P) logits
    labels: Tensor  # (N,) int64: the next token there, IGNORED where it is distilled but no target
    num_targets: int  # positions with a label


def shifted_target_mask(labels: Tensor) -> Tensor:
    """Mark the positions whose next label is a target.

    Args:
        labels: (batch, length) int64, aligned with the input tokens; IGNORED (-100) where there is nothing to predict.

    Returns:
        (batch, length) bool; the last position predicts nothing.

    >>> shifted_target_mask(torch.tensor([[-100, -100, 7, 8]])).tolist()
    [[False, True, True, False]]
    """
    return _next(labels, IGNORED) != IGNORED


def target_positions(
    labels: Tensor,
    attention_mask: Tensor | None = None,
    all_tokens: bool = False,
    position_ids: Tensor | None = None,
) -> Positions:
    """Return the positions of a micro-batch at which subnets learn, and the labels there.

    Args:
        labels: (batch, length) int64, aligned with the input tokens; IGNORED (-100) where there is no target.
        attention_mask: (batch, length), 0 at padding; only needed with ``all_tokens``.
        all_tokens: Every position that is followed by a token of the same document which is no padding, not just those
            before a target.
        position_ids: (batch, length) int64, of documents packed into rows; only needed with ``all_tokens`` and no
            ``attention_mask``. Nothing predicts a token at position 0, be it the first of a document or padding.
    """
    mask = shifted_target_mask(labels)
    if all_tokens and attention_mask is None and position_ids is not None:
        mask = mask | (_next(position_ids.expand_as(labels), 0) != 0)
    elif all_tokens:
        present = torch.ones_like(labels) if attention_mask is None else attention_mask
        mask = mask | ((present != 0) & (_next(present, 0) != 0))
    columns = mask.any(dim=0).nonzero().flatten()
    rows = mask[:, columns].flatten().nonzero().flatten()
    next_labels = _next(labels, IGNORED)[:, columns].flatten()[rows]
    return Positions(columns, rows, next_labels, int((next_labels != IGNORED).sum()))


def next_token_rows(positions: Positions, keep: Callable[[slice, Tensor], None] | None = None) -> RowLoss:
    """Return the mean cross-entropy of the next token over the targets, by rows: nats, 0 where there is no target.

    Args:
        positions: Which rows count, and their labels.
        keep: Called with each chunk's place and logits, for the subnets that learn from them.
    """

    def row_loss(logits: Tensor, place: slice) -> Tensor:
        if keep is not None:
            keep(place, logits.detach())
        return cross_entropy_rows(logits, positions.labels[place]) / max(1, positions.num_targets)

    return row_loss


def cross_entropy_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy per row, 0 where ignored: (n, vocabulary), (n,) int64 -> (n,) nats."""
    return functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits a chunk has on a device."""
    return max(1, CHUNK_ELEMENTS.get(device.type, DEFAULT_CHUNK_ELEMENTS) // vocabulary)


def kept_scale(dtype: torch.dtype) -> float:
    """Return what gradients are multiplied with while they wait for their backward.

    In fp16 those of a mean over many positions are rounded to 0, and the factor by which mixed precision scales its
    loss against that comes with the backward only.
    """
    return 2.0**10 if dtype == torch.float16 else 1.0


def sum_over_rows(row_loss: RowLoss, logits: Tensor, rows: Tensor, chunk: int | None = None) -> Tensor:
    """Add up a loss over some rows of the logits, a chunk at a time.

    The gradient is computed together with the value and kept in the logits' dtype, so that no second pass is needed.
    Can be differentiated once.

    Args:
        row_loss: Maps fp32 logits (n, vocabulary) and the slice of ``rows`` they stand for to (n,) losses.
        logits: (rows of all positions, vocabulary).
        rows: (N,) int64, distinct indices into the logits.
        chunk: Rows per chunk; None: what suits the device.
    """
    chunk = chunk or chunk_rows(logits.shape[-1], logits.device)
    total: Tensor = _SumOverRows.apply(logits, rows, row_loss, chunk)  # type: ignore[no-untyped-call]
    return total


class _SumOverRows(torch.autograd.Function):
    """The sum of :func:`sum_over_rows`; its gradient is computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, row_loss: RowLoss, chunk: int) -> Tensor:
        compute_dtype = torch.promote_types(logits.dtype, torch.float32)
        needs_gradient = ctx.needs_input_grad[0]
        ctx.scale = kept_scale(logits.dtype)
        ctx.gradient = torch.zeros_like(logits) if needs_gradient else None
        total = torch.zeros((), dtype=compute_dtype, device=logits.device)
        kept = torch.full_like(total, ctx.scale)
        for start in range(0, len(rows), chunk):
            place = slice(start, start + chunk)
            part = logits[rows[place]].to(compute_dtype).requires_grad_(needs_gradient)
            with torch.enable_grad():
                value = row_loss(part, place).sum()
            if needs_gradient:
                ctx.gradient[rows[place]] = torch.autograd.grad(value, part, kept)[0].to(logits.dtype)
            total += value.detach()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, hence only once
        if gradient is None:
            raise RuntimeError("sum_over_rows: a second backward through the same loss; compute the loss again")
        return gradient.mul_(grad_output / ctx.scale), None, None, None


def _next(values: Tensor, last: int) -> Tensor:
    """Return what stands one position later; ``last`` after the end. (batch, length) -> the same."""
    return functional.pad(values[:, 1:], (0, 1), value=last)
