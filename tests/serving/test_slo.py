"""Targets are read exactly, or refused with what is possible."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.errors import SloError
from amoeba_plugin.serving.slo import Latency, Limits, Slo, Target

seconds = st.floats(1e-4, 100)


@pytest.mark.parametrize(
    ("text", "fields", "limits"),
    [
        ("ttft<=60% tpot<=80%", {"ttft": 0.6, "tpot": 0.8}, Limits(0.6 * 2, 0.8 * 0.05)),
        ("ttft<=0.6 tpot<=20ms", {"ttft": 0.6, "tpot_ms": 20}, Limits(0.6 * 2, 0.02)),
        ("ttft<=0.2s", {"ttft_ms": 200}, Limits(0.2)),
        ("total<=1500ms", {"total_ms": 1500.0}, Limits(total=1.5)),
        ("", {}, Limits()),
    ],
)
def test_targets_as_text_and_as_fields(text: str, fields: dict[str, float], limits: Limits):
    whole = Latency(2, 0.05)
    for slo in (Slo.parse(text), Slo.of_fields(fields)):
        found = slo.limits(whole)
        assert (found.ttft, found.tpot, found.total) == pytest.approx((limits.ttft, limits.tpot, limits.total))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft<=200 tpot<=1", "of 200 without a unit is a share .* with a unit: ttft<=200ms"),
        ("total<=1", "a target for total needs a unit"),
        ("total<=50%", "a target for total needs a unit"),
        ("ttft<=0ms", "is 0, and must be above 0"),
        ("ttft<=101%", "a share"),
        ("ttft<=5ms ttft<=6ms", "name ttft twice"),
        ("ttft<=5ms total<=6ms", "name the total beside its parts"),
        ("ttft<5ms", "'ttft<5ms' is no target for time; write ttft<=200ms"),
        ("tptt<=5ms", "is no target"),
        ("ttft<=5m", "is no target"),
        ("ttft<=1e3ms", "is no target"),
        ("ttft<=" + "9" * 10 + "ms", "is no target"),
        ("ttft<=\u0665ms", "is no target"),  # a digit of another script
    ],
)
def test_texts_that_are_refused(text: str, message: str):
    with pytest.raises(SloError, match=message):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tftt": 1}, "no field 'tftt'. Did you mean 'ttft'"),
        ({"ttft": "0.5"}, "ttft is '0.5', and must be a number"),
        ({"ttft": True}, "must be a number"),
        ({"ttft": math.nan}, "is nan"),
        ({"tpot_ms": math.inf}, "is inf"),
        ({"ttft": 0.5, "ttft_ms": 5}, "names ttft as a share and in milliseconds"),
        ({"ttft": 1.5}, "share"),
        ({"total_ms": 5, "tpot": 1}, "the total beside its parts"),
        ({"tpot_ms": -1}, "is -1, and must be above 0"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(SloError, match=message):
        Slo.of_fields(fields)


@given(seconds, seconds, seconds, st.integers(1, 50), st.floats(0, 10))
def test_a_latency_keeps_what_a_clock_would_show(ttft: float, tpot: float, limit: float, answer: int, waited: float):
    shown, tokens = ttft, 1
    while tokens < answer:
        shown, tokens = shown + tpot, tokens + 1
    latency = Latency(ttft, tpot)
    assert latency.total(answer) == pytest.approx(shown)
    assert Limits(ttft=limit).kept_by(latency, answer) == (ttft <= limit)
    assert Limits(tpot=limit).kept_by(latency, answer) == (tpot <= limit)
    assert Limits(total=limit).behind(waited).kept_by(latency, answer) == (latency.total(answer) <= limit - waited)
    assert Limits(tpot=limit).behind(waited).tpot == limit


def test_targets_are_told_in_words():
    assert str(Slo(Target(0.6, True), Target(0.02))) == "ttft 0.6 of the whole model's tpot 20 ms"
    assert str(Slo(total=2)) == "total 2000 ms"
    assert str(Slo()) == "none"
