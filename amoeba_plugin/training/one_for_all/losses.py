"""Losses of in-place distillation and their balancing: pure functions.

Logits at position t predict the token at t + 1, so what is distilled are the positions whose *next* label is a target.
All losses are means over positions, in nats, in fp32. They are given by rows, so that whoever adds them up can walk
through the positions in chunks and take each chunk's gradient at once (:func:`sum_over_rows`): beside the logits and
their gradient, both in the logits' dtype, only one chunk lives in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
Divergence = Callable[
    [Tensor, Tensor, float], Tensor
]  # (student, teacher, temperature), (n, vocabulary) fp32 -> (n,) nats


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
        return _cross_entropy(logits, positions.labels[place]) / max(1, positions.num_targets)

    return row_loss


def distilled_rows(
    positions: Positions,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    target_weight: Tensor | float = 1.0,
) -> RowLoss:
    """Return ``kd_weight * KD + (1 - kd_weight) * CE`` by rows: nats, each a mean over its own positions.

    Args:
        positions: Which rows count, and their labels.
        teacher: (N, vocabulary) logits at ``positions.rows``; constant. Not looked at where ``kd_weight`` is 0.
        divergence: One of :data:`DIVERGENCES`: from logits (n, vocabulary) fp32 of both to (n,) nats.
        temperature: Divides both logits; gradients are not multiplied by its square.
        kd_weight: w in [0, 1].
        target_weight: Multiplies the cross-entropy, where positions that are distilled weigh by another share of a step
            than its targets.
    """

    def row_loss(student: Tensor, place: slice) -> Tensor:
        # L_i = w KD_i + (1 - w) CE_i (AmoebaLLM, arXiv:2411.10606, section on distillation; the paper has w = 1)
        if kd_weight < 1:
            cross_entropy = _cross_entropy(student, positions.labels[place]) / max(1, positions.num_targets)
        if kd_weight == 0:
            return target_weight * cross_entropy
        distillation = divergence(student, teacher[place].to(student.dtype), temperature) / max(1, len(positions.rows))
        if kd_weight == 1:
            return distillation
        return kd_weight * distillation + (1 - kd_weight) * target_weight * cross_entropy

    return row_loss


def balance(loss: Tensor, loss_largest: Tensor, max_ratio: float = 10.0) -> Tensor:
    """Return what a subnet's loss is multiplied with, to be as large as the largest subnet's: () constant.

    Args:
        loss: () of the subnet. A divergence, never negative, may be rounded to a little below 0: that counts as 0.
        loss_largest: () of the largest subnet; 0 where there was no target, and only the teacher is learned from.
        max_ratio: The largest ratio. A divergence goes to 0 where student and teacher agree, and the ratio to infinity.

    Returns:
        The ratio; 1 where the largest subnet has no loss. Only the gradient's scale changes with it.

    >>> balance(torch.tensor(4.0), torch.tensor(2.0)).item()
    0.5
    """
    # stopgrad(L_1 / L_i) (arXiv:2411.10606, loss-magnitude balancing)
    numerator, denominator = loss_largest.detach(), loss.detach().clamp(min=0)  # keeps NaN
    ratio = torch.where(numerator == 0, torch.ones_like(denominator), numerator / denominator)
    return ratio.clamp(max=max_ratio)


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


def soft_cross_entropy_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``-sum_v p_T(v) log p_S(v)`` per row, at least p_T's entropy: (n, vocabulary) twice -> (n,) nats."""
    # KD = -(1/|M|) sum_t sum_v p_T(v|t) log p_S(v|t) (arXiv:2411.10606); with teacher entropy, so L_1 / L_i stays tame
    student, teacher = _soften(student, temperature), _soften(teacher, temperature)
    return -(torch.softmax(teacher, dim=-1) * torch.log_softmax(student, dim=-1)).sum(dim=-1)


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``sum_v p_T (log p_T - log p_S)`` per row: (n, vocabulary) twice -> (n,) nats."""
    return _kl(_log_probabilities(teacher, temperature), _log_probabilities(student, temperature))


def reverse_kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``sum_v p_S (log p_S - log p_T)`` per row: (n, vocabulary) twice -> (n,) nats."""
    return _kl(_log_probabilities(student, temperature), _log_probabilities(teacher, temperature))


def jensen_shannon_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``(KL(p_T || m) + KL(p_S || m)) / 2`` per row, m the mean of both: (n, vocabulary) twice -> (n,) nats."""
    log_student, log_teacher = (_log_probabilities(logits, temperature) for logits in (student, teacher))
    log_mean = torch.logaddexp(log_student, log_teacher) - math.log(2)
    return (_kl(log_teacher, log_mean) + _kl(log_student, log_mean)) / 2


DIVERGENCES: Mapping[str, Divergence] = {
    "soft_cross_entropy": soft_cross_entropy_rows,
    "kl": kl_rows,
    "reverse_kl": reverse_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
}


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


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)  # 0 where ignored


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_soften(logits, temperature), dim=-1)


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature  # a pass over all logits, mostly for nothing


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _next(values: Tensor, last: int) -> Tensor:
    """Return what stands one position later; ``last`` after the end. (batch, length) -> the same."""
    return functional.pad(values[:, 1:], (0, 1), value=last)
