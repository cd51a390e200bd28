"""How exits vote: pure functions from their logits to one distribution, and the fit of weights and temperatures.

``weighted`` is the average of the exits' log-probabilities, with a temperature and a weight for each, fitted on text
that nothing was trained on; ``maximum`` the rule of Edge-LLM (arXiv:2406.15758): for every token the probability of
whichever exit gives it the highest, normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import model_validator
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.runtime.documents import Document

COLDEST, HOTTEST = 0.1, 10.0  # temperatures looked at


class Votes(Document):
    """How exits vote.

    Attributes:
        depths: Of the exits, ascending.
        weights: Of each, adding up to 1.
        temperatures: That each exit's logits are divided by.
        rule: One of :data:`RULES`.
        threshold: The probability of its likeliest token above which an exit answers alone, without those above it;
            ``None``: all of them vote.
    """

    what: ClassVar[str] = "a vote of exits"

    depths: tuple[int, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    rule: str = "weighted"
    threshold: float | None = None

    @model_validator(mode="after")
    def _has_one_of_each(self) -> Votes:
        require_rule(self.rule)
        if not 0 < len(self.depths) == len(self.weights) == len(self.temperatures):
            raise ValueError("give a weight and a temperature to every exit")
        return self

    @classmethod
    def alike(cls, depths: Sequence[int], rule: str = "weighted") -> Votes:
        """Return votes of the same weight, at temperature 1.

        Raises:
            RecipeError: If the rule is unknown.
        """
        require_rule(rule)
        count = len(depths)
        return cls(depths=tuple(depths), weights=(1 / count,) * count, temperatures=(1.0,) * count, rule=rule)

    def combined(self, logits: Tensor) -> Tensor:
        """Return log-probabilities, (..., vocabulary) fp32, of the exits' logits (exits, ..., vocabulary)."""
        along = (-1,) + (1,) * (logits.dim() - 1)
        temperatures = torch.tensor(self.temperatures, device=logits.device).view(along)
        weights = torch.tensor(self.weights, device=logits.device).view(along)
        return RULES[self.rule](torch.log_softmax(logits.float() / temperatures, dim=-1), weights)

    def alone(self, number: int, logits: Tensor) -> Tensor:
        """Return the log-probabilities, fp32, of one exit that answers without the others."""
        return torch.log_softmax(logits.float() / self.temperatures[number], dim=-1)

    def confidence(self, number: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return an exit's highest probability, (...,), and the token that has it, of its logits (..., vocabulary)."""
        highest, tokens = self.alone(number, logits).max(dim=-1)
        return highest.exp(), tokens


def _weighted(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    return torch.log_softmax((weights * log_probabilities).sum(dim=0), dim=-1)


def _maximum(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    return torch.log_softmax(log_probabilities.amax(dim=0), dim=-1)


#: From log-probabilities (exits, ..., vocabulary), and weights (exits, 1, ..., 1), to log-probabilities.
RULES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"weighted": _weighted, "maximum": _maximum}


def require_rule(rule: str) -> None:
    """Refuse a rule that is none.

    Raises:
        RecipeError: It names those that there are.
    """
    if rule not in RULES:
        raise RecipeError(f"vote '{rule}' is unknown; choose one of {', '.join(RULES)}")


def fit_votes(depths: Sequence[int], logits: Tensor, labels: Tensor, rule: str = "weighted") -> Votes:
    """Fit a temperature to every exit, then, for a weighted average, the weights: least next-token cross-entropy.

    Args:
        depths: Of the exits.
        logits: (exits, n, vocabulary), at positions of text that nothing was trained on.
        labels: (n,) int64, the next tokens there.
        rule: One of :data:`RULES`.

    Raises:
        RecipeError: If the rule is unknown.
    """
    require_rule(rule)
    temperatures = tuple(_temperature(each, labels) for each in logits)
    votes = Votes.alike(depths, rule).model_copy(update={"temperatures": temperatures})
    if rule != "weighted" or len(depths) == 1:
        return votes
    log_probabilities = torch.stack(
        [torch.log_softmax(each.float() / t, dim=-1) for each, t in zip(logits, temperatures, strict=True)]
    )
    return votes.model_copy(update={"weights": _weights(log_probabilities, labels)})


def fit_threshold(votes: Votes, logits: Tensor, agreement: float) -> Votes:
    """Return votes with the lowest threshold at which an answer is what all would have voted for often enough.

    Args:
        votes: Of the exits.
        logits: (exits, n, vocabulary), as in :func:`fit_votes`.
        agreement: Share of the positions, in (0, 1].
    """
    voted = votes.combined(logits).argmax(dim=-1)
    found = [votes.confidence(number, each) for number, each in enumerate(logits[:-1])]
    sure = torch.stack([confidence for confidence, _ in found])  # (exits below the deepest, n)
    right = torch.stack([tokens == voted for _, tokens in found])
    for threshold in sorted({0.0, *sure.flatten().tolist()}):
        leaves = sure > threshold
        first = leaves.int().argmax(dim=0, keepdim=True)
        agrees = torch.where(leaves.any(dim=0), right.gather(0, first)[0], torch.ones_like(voted, dtype=torch.bool))
        if agrees.float().mean() >= agreement:
            return votes.model_copy(update={"threshold": threshold})
    return votes.model_copy(update={"threshold": 1.0})


def _temperature(logits: Tensor, labels: Tensor) -> float:
    def loss(temperature: float) -> float:
        return _cross_entropy(torch.log_softmax(logits.float() / temperature, dim=-1), labels).item()

    found = minimize_scalar(loss, bounds=(COLDEST, HOTTEST), method="bounded", options={"xatol": 1e-3})
    return float(found.x)


def _weights(log_probabilities: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Return the weights of least cross-entropy; convex in them, whose sum is 1."""

    def loss(free: list[float]) -> tuple[float, list[float]]:
        # of the softmax of free numbers, so that every weight is above 0 and their sum is 1
        values = torch.tensor(free, dtype=torch.float32).requires_grad_()
        weights = torch.softmax(values, dim=0).view(-1, 1, 1)
        value = _cross_entropy(_weighted(log_probabilities, weights), labels)
        value.backward()
        assert values.grad is not None
        return value.item(), values.grad.tolist()

    with torch.enable_grad():
        found = minimize(loss, [0.0] * len(log_probabilities), jac=True, method="L-BFGS-B")
    return tuple(torch.softmax(torch.tensor(found.x), dim=0).tolist())


def _cross_entropy(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, labels[:, None]).mean()
