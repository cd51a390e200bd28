"""Which shapes, at how much of a prompt, keep a request's targets, by the profile of what really runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from amoeba_plugin.deployment.profiling.cost_model import cost_models
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.errors import SloError
from amoeba_plugin.serving.slo import Latency, Limits, Slo
from amoeba_plugin.shape import ShapeSpace, SubnetShape

SHARES = tuple(Fraction(tenths, 10) for tenths in range(10, 0, -1))  # of a prompt (the paper's ten levels)
LatencyOf = Callable[[SubnetShape, int], Latency]


@dataclass(frozen=True)
class Prompt:
    """How long a prompt is.

    Attributes:
        tokens: All of them.
        droppable: Those that may be left out: no question, no template.
    """

    tokens: int
    droppable: int = 0

    def kept(self, share: Fraction) -> int:
        """Return how many tokens stay at a share.

        >>> Prompt(100, 60).kept(Fraction(1, 2)), Prompt(100).kept(Fraction(1, 2))
        (70, 100)
        """
        return self.tokens - self.droppable + math.ceil(share * self.droppable)


@dataclass(frozen=True, order=True)
class Decision:
    """What a request gets: a shape, and the share of the droppable tokens of its prompt that stays."""

    shape: SubnetShape
    share: Fraction = Fraction(1)

    def __str__(self) -> str:
        return f"{self.shape} on {float(self.share):.0%} of the prompt"


@dataclass(frozen=True)
class Asked:
    """A request, as far as a decision needs it.

    Attributes:
        prompt: How long it is.
        answer: Tokens of the answer, at most.
        slo: Its targets.
        waited: Seconds that it waits before anything is computed.
    """

    prompt: Prompt
    answer: int
    slo: Slo
    waited: float = 0.0


@dataclass(frozen=True)
class Feasible:
    """What every decision takes, and which of them keep a request's targets.

    Attributes:
        whole: Of the whole model on the whole prompt, once it has waited: what shares are of.
        limits: Of the request, once it has waited.
        latencies: Of all decisions; larger shapes first, and of each shape larger shares.
        answer: Tokens of the answer, at most.
    """

    whole: Latency
    limits: Limits
    latencies: Mapping[Decision, Latency]
    answer: int

    @property
    def decisions(self) -> list[Decision]:
        """Those that keep the targets, in the order of ``latencies``."""
        return [each for each, latency in self.latencies.items() if self.limits.kept_by(latency, self.answer)]

    @property
    def nearest(self) -> Decision:
        """The decision that exceeds the targets least, relative to them."""

        def excess(decision: Decision) -> float:
            latency, limits = self.latencies[decision], self.limits
            return max(
                _over(latency.ttft, limits.ttft),
                _over(latency.tpot, limits.tpot),
                _over(latency.total(self.answer), limits.total),
            )

        return min(self.latencies, key=excess)

    def at(self, shape: SubnetShape) -> Feasible:
        """Return it without the decisions for other shapes."""
        return replace(self, latencies={each: took for each, took in self.latencies.items() if each.shape == shape})

    def listed(self, decision: Decision) -> Decision:
        """Return the decision of ``latencies`` that keeps as many tokens: of shares that do, only the largest is there.

        Of a shape that is not there it is the decision itself.
        """
        shares = [
            each.share for each in self.latencies if each.shape == decision.shape and each.share >= decision.share
        ]
        return Decision(decision.shape, min(shares, default=decision.share))

    def require(self) -> list[Decision]:
        """Return the decisions that keep the targets.

        Raises:
            SloError: If none does, with the nearest and what it takes.
        """
        found = self.decisions
        if not found:
            nearest = self.nearest
            took = self.latencies[nearest]
            raise SloError(
                f"no shape keeps {_words(self.limits)}: the nearest, {nearest}, takes {took.ttft * 1e3:.4g} ms to the "
                f"first token and {took.tpot * 1e3:.4g} ms for each behind it; ask for more time, or for fewer tokens"
            )
        return found


def feasible(space: ShapeSpace, latency_of: LatencyOf, asked: Asked, shares: Sequence[Fraction] = SHARES) -> Feasible:
    """Return what every shape takes at every share of a prompt, beside a request's targets.

    Args:
        space: Of the elastic model.
        latency_of: Returns what a shape takes on so many tokens.
        asked: The request.
        shares: Of the droppable tokens, largest first; those that keep equally many tokens are one.
    """
    kept: dict[int, Fraction] = {}
    for share in shares:
        kept.setdefault(asked.prompt.kept(share), share)
    latencies = {Decision(shape, share): latency_of(shape, tokens) for shape in space for tokens, share in kept.items()}
    alone = latency_of(space.largest, asked.prompt.tokens)
    whole = Latency(asked.waited + alone.ttft, alone.tpot)
    return Feasible(whole, asked.slo.limits(whole).behind(asked.waited), latencies, asked.answer)


def profiled(profile: Profile, point: str) -> LatencyOf:
    """Return what predicts latencies of shapes by a profile.

    Args:
        profile: Knows the point.
        point: What runs: ``torch:elastic``.
    """
    models, works = cost_models(profile.flows[point]), profile.works

    def latency(shape: SubnetShape, tokens: int) -> Latency:
        work = works[str(shape)]
        return Latency(models["prefill"].predict(work, tokens).value, models["decode"].predict(work).value)

    return latency


def _over(took: float, limit: float) -> float:
    return took / limit if limit > 0 else math.inf if took else 0.0


def _words(limits: Limits) -> str:
    named = {"ttft": limits.ttft, "tpot": limits.tpot, "total": limits.total}
    return " and ".join(f"{name} {limit * 1e3:.4g} ms" for name, limit in named.items() if limit < math.inf)
