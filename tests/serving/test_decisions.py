"""Decisions against loops over all shapes and shares; whatever decides, the targets are kept."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile, Round, Seconds, ShapeCost
from amoeba_plugin.errors import PluginError, SloError
from amoeba_plugin.plugins.manager import collected
from amoeba_plugin.serving.deciders import DeciderOptions, best_of, decided
from amoeba_plugin.serving.feasible import SHARES, Asked, Decision, Feasible, Prompt, feasible, profiled
from amoeba_plugin.serving.registry import decider_named
from amoeba_plugin.serving.slo import Latency, Limits, Slo, Target, within
from amoeba_plugin.shape import ShapeSpace, SubnetShape

SPACE = ShapeSpace((12, 10, 8), (Fraction(1), Fraction(3, 4), Fraction(1, 2)))
shares = st.floats(0.05, 1).map(lambda share: Target(share, True))
requests = st.builds(
    Asked,
    st.integers(1, 300).flatmap(lambda tokens: st.builds(Prompt, st.just(tokens), st.integers(0, tokens))),
    st.integers(1, 60),
    st.builds(Slo, st.none() | shares, st.none() | shares) | st.builds(Slo, total=st.floats(0.01, 2)),
    st.floats(0, 0.05),
)


def latency(shape: SubnetShape, tokens: int) -> Latency:
    """Ranks of shapes differ between the two phases, as they do in engines."""
    draw = random.Random(str(shape))
    size = shape.depth / 12 * float(shape.width) * draw.uniform(0.9, 1.1)
    return Latency(1e-3 + 1e-3 * tokens * size, 0.02 * (0.2 + 0.8 * size * draw.uniform(0.9, 1.1)))


def of_loops(asked: Asked) -> set[Decision]:
    whole = latency(SPACE.largest, asked.prompt.tokens)
    kept = set()
    for depth in SPACE.depths:
        for width in SPACE.widths:
            lengths = set()
            for tenths in range(10, 0, -1):
                tokens = asked.prompt.tokens - asked.prompt.droppable + math.ceil(asked.prompt.droppable * tenths / 10)
                took = latency(SubnetShape(depth, width), tokens)
                slo, waited = asked.slo, asked.waited
                good = slo.ttft is None or within(took.ttft, slo.ttft.amount * (whole.ttft + waited) - waited)
                good &= slo.tpot is None or took.tpot <= slo.tpot.amount * whole.tpot
                good &= slo.total is None or took.ttft + (asked.answer - 1) * took.tpot <= slo.total - waited
                if good and tokens not in lengths:
                    kept.add(Decision(SubnetShape(depth, width), Fraction(tenths, 10)))
                lengths.add(tokens)
    return kept


@given(requests)
def test_what_is_feasible_is_what_loops_find(asked: Asked):
    found = feasible(SPACE, latency, asked)
    assert set(found.decisions) == of_loops(asked)
    assert len(found.decisions) == len(set(found.decisions))


@given(requests)
def test_a_request_that_nothing_keeps_is_told_what_comes_nearest(asked: Asked):
    found = feasible(SPACE, latency, asked)
    if found.decisions:
        assert found.require() == found.decisions
        return
    with pytest.raises(SloError, match="no shape keeps") as refused:
        found.require()
    assert str(found.nearest) in str(refused.value)
    whole = Slo(Target(10.0), Target(10.0)) if asked.slo.total is None else Slo(total=100.0)
    assert feasible(SPACE, latency, Asked(asked.prompt, asked.answer, whole)).decisions


@pytest.mark.parametrize("name", sorted(collected("decision", "amoeba_decisions")))
@given(asked=requests, seed=st.integers(0, 9), share=st.sampled_from(SHARES))
def test_whatever_decides_the_targets_are_kept(name: str, asked: Asked, seed: int, share: Fraction):
    found = feasible(SPACE, latency, asked)
    options = DeciderOptions(SubnetShape(10, Fraction(3, 4)), share, seed)
    if not found.decisions:
        with pytest.raises(SloError):
            decided(decider_named(name, options), found)
        return
    decision = decided(decider_named(name, options), found)
    assert decision in found.decisions
    asked_for = [each for each in found.decisions if each.shape == options.shape and each.share >= share]
    if name == "fixed" and any(asked.prompt.kept(each.share) == asked.prompt.kept(share) for each in asked_for):
        assert decision == min(asked_for, key=lambda each: each.share)
    if name == "random_feasible":
        assert decision == decided(decider_named(name, options), found)


def test_the_largest_is_by_time_per_token_and_then_by_the_prompt():
    latencies = {
        Decision(SubnetShape(8, Fraction(1)), Fraction(1)): Latency(1, 3),
        Decision(SubnetShape(8, Fraction(1)), Fraction(1, 2)): Latency(0.5, 3),
        Decision(SubnetShape(12, Fraction(1, 2)), Fraction(1)): Latency(2, 2),
    }
    found = Feasible(Latency(3, 3), Limits(), latencies, 1)
    assert best_of(found) == next(iter(latencies))
    assert best_of(Feasible(Latency(3, 3), Limits(ttft=0.7), latencies, 1)) == list(latencies)[1]
    assert best_of(Feasible(Latency(3, 3), Limits(ttft=0.1), latencies, 1)) is None


@given(requests, st.sampled_from(list(SPACE)), st.sampled_from(SHARES))
def test_a_share_that_keeps_as_many_tokens_as_a_listed_one_is_that_one(
    asked: Asked, shape: SubnetShape, share: Fraction
):
    found = feasible(SPACE, latency, asked)
    listed = found.listed(Decision(shape, share))
    assert listed in found.latencies
    assert listed.shape == shape
    assert asked.prompt.kept(listed.share) == asked.prompt.kept(share)


def test_every_feasible_decision_is_drawn_about_as_often():
    asked = Asked(Prompt(100, 80), 1, Slo.parse("ttft<=30%"))
    found, decide = feasible(SPACE, latency, asked), decider_named("random_feasible", DeciderOptions(seed=1))
    drawn = [decide(found, None) for _ in range(100 * len(found.decisions))]
    assert all(50 < drawn.count(each) < 160 for each in found.decisions)


def test_a_profile_tells_latencies():
    def visit(scale: float) -> Round:
        took = Seconds(wall=scale, cpu=scale)
        return Round(load=took, prefill={8: took, 16: Seconds(wall=2 * scale, cpu=2 * scale)}, decode=took, peak=1)

    sizes = {str(shape): (2 * int(shape.depth), 8, int(64 * shape.depth * shape.width)) for shape in SPACE}
    shapes = {name: ShapeCost(work=work, bytes=1, rounds=[visit(sum(work))]) for name, work in sizes.items()}
    flow = FlowProfile(engine={}, threads=1, batch=1, decoded=4, shapes=shapes)
    profile = Profile(model="m", digest="", sizes=sizes, machine={}, flows={"torch:elastic": flow})
    found = profiled(profile, "torch:elastic")(SubnetShape(10, Fraction(1, 2)), 16)
    assert (found.ttft, found.tpot) == (2 * (20 + 8 + 320), 20 + 8 + 320)


def test_an_unknown_decision_names_the_known_ones():
    with pytest.raises(
        PluginError, match="no decision named 'largest'.*dual_head, fixed, largest_feasible, random_feasible"
    ):
        decider_named("largest")


@given(requests)
def test_no_larger_shape_that_keeps_the_targets_is_passed_over(asked: Asked):
    found = feasible(SPACE, latency, asked)
    best = best_of(found)
    assert (best is None) == (not found.decisions)
    for other in found.decisions:
        if best is not None and other.share >= best.share and other.shape != best.shape:
            assert other.shape.depth < best.shape.depth or other.shape.width < best.shape.width


def test_who_names_no_target_gets_the_whole_model_though_another_shape_was_measured_slower():
    def odd(shape: SubnetShape, tokens: int) -> Latency:
        return Latency(1.0, 2.0 if str(shape) == "12x3/4" else 1.0)

    best = best_of(feasible(SPACE, odd, Asked(Prompt(30, 10), 5, Slo())))
    assert best == Decision(SPACE.largest)
