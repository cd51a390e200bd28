"""A profile as tables: what every shape costs in a flow, and the shapes that flows do not rank alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from amoeba_plugin.deployment.profiling.cost_model import Prediction, cost_models
from amoeba_plugin.deployment.profiling.profile import Profile

MB, MS = 1e6, 1e-3


@dataclass(frozen=True)
class Row:
    """What one shape costs: milliseconds, or MB.

    Attributes:
        shape: Its name.
        prefill: By prompt length.
        decode: Of one token.
        memory: Resident at most.
        file: Of all files.
    """

    shape: str
    prefill: Mapping[int, Prediction]
    decode: Prediction
    memory: Prediction
    file: Prediction


def rows(profile: Profile, flow: str) -> list[Row]:
    """Return what every shape of the space costs in a flow, the largest first; measured where it was."""
    models = cost_models(profile.flows[flow])
    lengths = sorted({sample.tokens for sample in models["prefill"].samples})
    found = []
    for shape, work in profile.works.items():

        def cost(kind: str, unit: float, tokens: int = 0, work: object = work) -> Prediction:
            return _in(unit, models[kind].predict(work, tokens))  # type: ignore[arg-type]

        prefill = {tokens: cost("prefill", MS, tokens) for tokens in lengths}
        found.append(Row(shape, prefill, cost("decode", MS), cost("memory", MB), cost("file", MB)))
    return found


def disagreements(profile: Profile, tokens: int | None = None) -> list[tuple[str, str, str, str]]:
    """Return pairs of shapes of which one flow or phase is surely faster at the one, and another at the other.

    Args:
        profile: Of one flow or several.
        tokens: Prompt length; default the longest.

    Returns:
        (flow and phase, its faster shape, another flow and phase, its faster shape): one pair for two of them.
    """
    orders = _orders(profile, tokens)
    found = []
    names = list(orders)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            pair = _pair(orders[one], orders[other])
            if pair is not None:
                found.append((one, pair[0], other, pair[1]))
    return found


def _orders(profile: Profile, tokens: int | None) -> dict[str, dict[str, Prediction]]:
    orders: dict[str, dict[str, Prediction]] = {}
    for flow in profile.flows:
        table = rows(profile, flow)
        length = tokens or max(table[0].prefill)
        orders[f"{flow} prefill[{length}]"] = {row.shape: row.prefill[length] for row in table}
        orders[f"{flow} decode"] = {row.shape: row.decode for row in table}
    return orders


def _pair(one: Mapping[str, Prediction], other: Mapping[str, Prediction]) -> tuple[str, str] | None:
    """Return the shapes that two orders disagree on most, beyond their intervals."""
    best, found = 1.0, None
    for first in one:
        for second in one:
            sure = one[first].high < one[second].low and other[second].high < other[first].low
            ratio = one[second].value / one[first].value * other[first].value / other[second].value
            if sure and ratio > best:
                best, found = ratio, (first, second)
    return found


def _in(unit: float, cost: Prediction) -> Prediction:
    return Prediction(cost.value / unit, cost.low / unit, cost.high / unit, cost.measured)
