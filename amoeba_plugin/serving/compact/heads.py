"""The two heads of the compact model (ELMS, arXiv:2409.09071, section 3.2).

The paper's heads stand on twelve layers of MobileBERT each, and its decision head reads the targets as tokens. Here
both stand on the elastic model's own first features, and the decision head gives every shape and share a score; what
the targets allow is known exactly, so the best of that is taken, and no target has to be learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from amoeba_plugin.shape import SubnetShape

INSIDE, SPREAD = 64, 9  # channels of a head; tokens that a token sees around itself


@dataclass(frozen=True)
class Choices:
    """What the decision head scores.

    Attributes:
        shapes: Of the elastic model.
        shares: Of the droppable tokens, largest first; shares between them are interpolated.
    """

    shapes: tuple[SubnetShape, ...]
    shares: tuple[Fraction, ...]


def marked(positions: Sequence[int], tokens: int) -> Tensor:
    """Return which of so many tokens are at positions, (tokens,) bool."""
    found = torch.zeros(tokens, dtype=torch.bool)
    found[list(positions)] = True
    return found


class ScoreHead(nn.Module):
    """Tells how much each token matters, from its features and those around it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inwards = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, INSIDE))
        self.around = nn.Conv1d(INSIDE, INSIDE, SPREAD, padding=SPREAD // 2, groups=INSIDE)
        self.outwards = nn.Sequential(nn.GELU(), nn.Linear(INSIDE, INSIDE), nn.GELU(), nn.Linear(INSIDE, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Return (tokens,) of (tokens, size)."""
        inside: Tensor = self.inwards(features)
        seen = inside + self.around(inside.T[None])[0].T
        scores: Tensor = self.outwards(seen)[:, 0]
        return scores


class DecisionHead(nn.Module):
    """Gives every shape and share the logit of how probably it answers right."""

    def __init__(self, size: int, choices: Choices) -> None:
        super().__init__()
        shapes, shares = len(choices.shapes), len(choices.shares)
        self.inwards = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, INSIDE), nn.GELU())
        self.outwards = nn.Sequential(nn.Linear(2 * INSIDE + 2, INSIDE), nn.GELU(), nn.Dropout(0.1))
        self.shapes, self.shares = nn.Linear(INSIDE, shapes), nn.Linear(INSIDE, shares)
        self.usual = nn.Parameter(torch.zeros(shapes, shares))  # of all prompts
        for head in (self.shapes, self.shares):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, summary: Tensor) -> Tensor:
        """Return (batch, shapes, shares) of summaries (batch, 2 x inside + 2)."""
        seen = self.outwards(summary)
        logits: Tensor = self.shapes(seen)[:, :, None] + self.shares(seen)[:, None, :] + self.usual
        return logits

    def summary(self, features: Tensor, droppable: Tensor) -> Tensor:
        """Return what a prompt is to the head: means over what may be left out and over the rest, and their lengths.

        Args:
            features: (tokens, size).
            droppable: (tokens,) bool; not all are.
        """
        inside: Tensor = self.inwards(features)
        spare, stays = inside[droppable], inside[~droppable]
        lengths = torch.tensor([len(spare), len(stays)], dtype=inside.dtype).log1p() / 5
        means = [each.mean(0) if len(each) else inside.new_zeros(INSIDE) for each in (spare, stays)]
        return torch.cat([*means, lengths])
