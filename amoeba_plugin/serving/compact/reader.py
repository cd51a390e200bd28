"""The compact model as the service's reader of prompts."""

from __future__ import annotations

import itertools
from fractions import Fraction

import torch
from torch import Tensor

from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.compact.features import PromptFeatures
from amoeba_plugin.serving.compact.heads import Choices, DecisionHead, ScoreHead, marked
from amoeba_plugin.serving.feasible import Decision, Feasible
from amoeba_plugin.serving.reading import Reading


class CompactModel:
    """Reads requests: features once, both heads on them.

    Args:
        features: Of the elastic model, or of an encoder.
        scores: Tells which tokens matter.
        decisions: Chooses shape and share; ``None``: nothing, only scores are given.
        choices: Of ``decisions``.
    """

    def __init__(
        self, features: PromptFeatures, scores: ScoreHead, decisions: DecisionHead | None, choices: Choices
    ) -> None:
        self.features, self.scores, self.decisions, self.choices = features, scores.eval(), decisions, choices
        if decisions is not None:
            decisions.eval()

    @torch.inference_mode()
    def __call__(self, request: Request) -> Reading:
        """Read a request's prompt."""
        seen = self.features(request.tokens)
        scores = self.scores(seen).tolist() if len(request.droppable) else [0.0] * len(request.tokens)
        if self.decisions is None:
            return Reading(scores)
        droppable = marked(request.droppable, len(request.tokens))
        logits = self.decisions(self.decisions.summary(seen, droppable)[None])[0]
        return Reading(scores, lambda feasible: likeliest(feasible, self.choices, logits))


def likeliest(feasible: Feasible, choices: Choices, logits: Tensor) -> Decision | None:
    """Return the feasible decision that answers right most probably; of equal ones the lightest.

    Args:
        feasible: What there is.
        choices: What was scored.
        logits: (shapes, shares).
    """
    row = {shape: index for index, shape in enumerate(choices.shapes)}

    def worth(decision: Decision) -> tuple[float, float, float]:
        latency = feasible.latencies[decision]
        return interpolated(logits[row[decision.shape]], choices.shares, decision.share), -latency.ttft, -latency.tpot

    return max((each for each in feasible.decisions if each.shape in row), key=worth, default=None)


def interpolated(values: Tensor, shares: tuple[Fraction, ...], share: Fraction) -> float:
    """Return the value at a share, linear between its neighbours, and the last one beyond the ends.

    >>> interpolated(torch.tensor([3.0, 1.0]), (Fraction(1), Fraction(1, 2)), Fraction(3, 4))
    2.0

    Args:
        values: (shares,).
        shares: Descending.
        share: Any.
    """
    for index, (above, below) in enumerate(itertools.pairwise(shares)):
        if below <= share <= above:
            part = float((above - share) / (above - below))
            return float(values[index]) * (1 - part) + float(values[index + 1]) * part
    return float(values[0] if share > shares[0] else values[-1])
