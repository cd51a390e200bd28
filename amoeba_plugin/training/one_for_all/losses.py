"""Losses of in-place distillation and their balancing: pure functions.

Logits at position t predict the token at t + 1, so what is distilled are the positions whose *next* label is a target.
All losses are means over positions, in nats, in fp32, and given by rows (:mod:`amoeba_plugin.training.next_token`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from amoeba_plugin.training.next_token import Positions, RowLoss, cross_entropy_rows

Divergence = Callable[
    [Tensor, Tensor, float], Tensor
]  # (student, teacher, temperature), (n, vocabulary) fp32 -> (n,) nats


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
            cross_entropy = cross_entropy_rows(student, positions.labels[place]) / max(1, positions.num_targets)
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


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_soften(logits, temperature), dim=-1)


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature  # a pass over all logits, mostly for nothing


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
