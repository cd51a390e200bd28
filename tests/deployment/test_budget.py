"""Budgets: read as they are written, refused with what to write, and kept or not beyond the intervals of costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.deployment.budget import SHOWN, UNITS, Budget, Limit, Verdict
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.errors import BudgetError


def test_a_budget_in_words_and_in_fields():
    budget = Budget.parse("llama-cpp:Q4_0 decode<=12ms prefill[256]<=0.2s memory<=300MB")
    assert budget.points == (Point("llama-cpp", "Q4_0"),)
    assert budget.limits == (Limit("decode", 0.012), Limit("prefill", 0.2, 256), Limit("memory", 3e8))
    fields = {"flow": "llama-cpp:Q4_0", "decode": "12ms", "prefill[256]": "200ms", "memory": "300MB"}
    assert Budget.of_fields(fields) == budget
    assert Budget.parse("torch:fp32 file<=1GiB").limits[0].most == 2**30


def test_a_budget_of_several_schemes():
    budget = Budget.parse("llama-cpp:F16,Q8_0,torch:fp32 decode<=12ms")
    assert budget.points == (Point("llama-cpp", "F16"), Point("llama-cpp", "Q8_0"), Point("torch", "fp32"))
    assert str(budget) == "llama-cpp:F16,Q8_0,torch:fp32 decode<=12ms"
    for flow in (["llama-cpp:F16", "llama-cpp:Q8_0", "torch:fp32"], "llama-cpp:F16, Q8_0, torch:fp32"):
        assert Budget.of_fields({"flow": flow, "decode": "12ms"}) == budget


LIMITS = st.sampled_from(sorted(UNITS)).flatmap(
    lambda kind: st.builds(
        Limit,
        st.just(kind),
        st.integers(1, 10**5).map(lambda number: number * float(UNITS[kind][SHOWN[kind]])),
        st.integers(1, 10**6) if kind == "prefill" else st.just(0),
    )
)


@given(st.lists(LIMITS, min_size=1, unique_by=lambda limit: limit.name))
def test_what_is_written_is_read_back(limits: list[Limit]):
    budget = Budget((Point("torch", "fp32"),), tuple(limits))
    again = Budget.parse(str(budget))
    assert [limit.name for limit in again.limits] == [limit.name for limit in limits]
    assert [limit.most for limit in again.limits] == pytest.approx([limit.most for limit in limits])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no engine at a scheme"),
        ("decode<=12ms", "names no engine at a scheme"),
        ("torch decode<=12ms", "names no engine at a scheme"),
        ("torch:fp32", "limits nothing"),
        ("torch:fp32 decode<12ms", "write KIND<=NUMBER and a unit"),
        ("torch:fp32 decode<=12", "the unit is missing; decode is in s, ms, us"),
        ("torch:fp32 decode<=12MB", "'MB' is no unit of it"),
        ("torch:fp32 memory<=12mb", "'mb' is no unit of it; memory is in B, kB, MB"),
        ("torch:fp32 decoded<=12ms", "no cost 'decoded'. Did you mean 'decode'?"),
        ("torch:fp32 prefill<=12ms", "write prefill[256]<=12ms"),
        ("torch:fp32 decode[5]<=12ms", "only prefill has a length; write decode<=12ms"),
        ("torch:fp32 decode<=0ms", "a number above 0"),
        ("torch:fp32 prefill[0]<=1ms", "a number above 0"),
        ("torch:fp32 decode<=-1ms", "write KIND<=NUMBER"),
        ("torch:fp32 decode<=nanms", "write KIND<=NUMBER"),
        ("torch:fp32,fp32 decode<=12ms", "names torch:fp32 twice"),
        ("torch:fp32, decode<=12ms", "names no engine at a scheme"),
        ("fp32,torch:bf16 decode<=12ms", "names no engine at a scheme"),
        ("torch:fp32 decode<=12ms decode<=13ms", "names decode twice"),
    ],
)
def test_what_is_no_budget_is_answered_with_what_is(text: str, said: str):
    with pytest.raises(BudgetError) as refusal:
        Budget.parse(text)
    assert said in str(refusal.value)


def test_fields_without_a_flow():
    with pytest.raises(BudgetError, match="names no flow; write flow"):
        Budget.of_fields({"decode": "12ms"})


def test_costs_keep_a_budget_exceed_it_or_must_be_measured():
    decode, memory = Limit("decode", 0.010), Limit("memory", 1e6)
    budget = Budget((Point("torch", "fp32"),), (decode, memory))
    small = Prediction(9e5, 8e5, 1e6)
    for cost, verdict in (
        (Prediction(0.009, 0.008, 0.010), Verdict.KEEPS),
        (Prediction(0.009, 0.008, 0.011), Verdict.UNSURE),
        (Prediction(0.012, 0.011, 0.013), Verdict.EXCEEDS),
        (Prediction(0.0099, 0.008, 0.011, measured=True), Verdict.KEEPS),
        (Prediction(0.0101, 0.008, 0.011, measured=True), Verdict.EXCEEDS),
    ):
        assert budget.verdict({decode: cost, memory: small}) is verdict
        assert budget.verdict({decode: cost, memory: Prediction(2e6, 2e6, 2e6)}) is Verdict.EXCEEDS
