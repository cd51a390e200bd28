"""Trains the two heads, one after the other, on features that stay as they are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from amoeba_plugin.serving.compact.heads import Choices, DecisionHead, ScoreHead

Head = TypeVar("Head", bound=nn.Module)
EPOCHS, RATE, DECAY = 30, 2e-3, 0.05
AT_ONCE, HELD_OUT = 8, 5  # prompts in a step; every fifth is held out, to tell when to stop


@dataclass(frozen=True)
class Read:
    """A prompt of which features were taken.

    Attributes:
        features: (tokens, size).
        droppable: (tokens,) bool.
    """

    features: Tensor
    droppable: Tensor


def trained_scores(reads: Sequence[Read], labels: Sequence[Tensor], seed: int = 0) -> tuple[ScoreHead, float]:
    """Return a score head, and how much of the held-out labels' variance it explains.

    A prompt's labels are compared with one another only, so they are learnt in units of their own spread.

    Args:
        reads: Prompts.
        labels: What each token of each matters, (tokens,).
        seed: Of weights and order.
    """
    wanted = [_standardised(label, read.droppable) for label, read in zip(labels, reads, strict=True)]

    def lost(head: nn.Module, numbers: Sequence[int]) -> Tensor:
        each = [
            functional.mse_loss(head(reads[number].features)[reads[number].droppable], wanted[number])
            for number in numbers
        ]
        return torch.stack(each).mean()

    useful = [number for number, label in enumerate(wanted) if len(label)]
    head, left = _trained(lambda: ScoreHead(reads[0].features.shape[1]), lost, useful, seed)
    return head, 1 - left  # labels have variance 1


def trained_decisions(
    reads: Sequence[Read], right: Tensor, choices: Choices, seed: int = 0
) -> tuple[DecisionHead, float]:
    """Return a decision head, and its held-out cross-entropy, nats of one answer.

    Args:
        reads: Prompts.
        right: (prompts, shapes, shares) bool: what answers each right.
        choices: Shapes and shares.
        seed: Of weights and order.
    """
    truth = right.float()
    usual = truth.mean(0) * (len(truth) / (len(truth) + 2)) + 1 / (len(truth) + 2)  # neither 0 nor 1

    def made() -> DecisionHead:
        head = DecisionHead(reads[0].features.shape[1], choices)
        head.usual.data.copy_(usual.logit())
        return head

    def lost(head: nn.Module, numbers: Sequence[int]) -> Tensor:
        assert isinstance(head, DecisionHead)
        summaries = torch.stack([head.summary(reads[each].features, reads[each].droppable) for each in numbers])
        return functional.binary_cross_entropy_with_logits(head(summaries), truth[list(numbers)])

    return _trained(made, lost, list(range(len(reads))), seed)


def _trained(
    made: Callable[[], Head], lost: Callable[[nn.Module, Sequence[int]], Tensor], numbers: list[int], seed: int
) -> tuple[Head, float]:
    """Return the head as it was when it lost least on what is held out; as it was made, if training only hurt."""
    held_out = numbers[::HELD_OUT] if len(numbers) >= 2 * HELD_OUT else numbers
    seen = [number for number in numbers if number not in set(held_out)] or numbers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = made()
        optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
        best, kept = math.inf, dict(head.state_dict())
        for epoch in range(EPOCHS + 1):
            with torch.no_grad():
                left = float(lost(head.eval(), held_out))
            if left < best:
                best, kept = left, {name: each.clone() for name, each in head.state_dict().items()}
            for some in _steps(seen, seed + epoch):
                optimizer.zero_grad()
                lost(head.train(), some).backward()
                optimizer.step()
    head.load_state_dict(kept)
    return head.eval(), best


def _steps(numbers: Sequence[int], seed: int) -> Iterator[list[int]]:
    order = random.Random(seed).sample(numbers, len(numbers))
    return (order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE))


def _standardised(label: Tensor, droppable: Tensor) -> Tensor:
    """Return the labels of what may be left out, with mean 0 and variance 1."""
    spare = label[droppable].log1p()  # nats and gradients have long tails
    return (spare - spare.mean()) / spare.std(correction=0).clamp_min(1e-6) if len(spare) else spare
