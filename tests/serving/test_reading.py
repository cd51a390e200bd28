"""Prompts that were read: what stays of them, what they get, and what the reading costs."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amoeba_plugin.errors import DataError, SloError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.serving.feasible import Decision, Feasible
from amoeba_plugin.serving.reading import Reading, kept_positions
from amoeba_plugin.serving.registry import decider_named
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency, Slo
from amoeba_plugin.shape import SubnetShape
from support.models import make_tiny_model, random_elastic

PROMPT = [5, 9, 31, 2, 77, 12, 40, 8]
SCORES = [0.0, 3.0, 1.0, 2.0, 2.0, 5.0, 0.0, 0.0]
DROPPABLE = [1, 2, 3, 4, 5]  # of which 2 goes first, then 4 and 3


def scored(wanted: Decision | None = None) -> Reading:
    return Reading(SCORES, lambda feasible: wanted)


@given(st.data())
def test_what_stays_are_the_best_in_their_order(data: st.DataObject):
    scores = data.draw(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12))
    tokens = len(scores)
    droppable = sorted(data.draw(st.sets(st.integers(0, tokens - 1))))
    count = data.draw(st.integers(tokens - len(droppable), tokens))
    best = max(
        (
            [each for each in range(tokens) if each not in gone]
            for gone in itertools.combinations(droppable, tokens - count)
        ),
        key=lambda kept: (sum(scores[each] for each in kept), [-each for each in kept]),
    )
    assert kept_positions(tokens, droppable, scores, count) == best


@pytest.mark.parametrize(
    ("share", "kept"),
    [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (Fraction(4, 5), [0, 1, 3, 4, 5, 6, 7]), (Fraction(3, 10), [0, 1, 5, 6, 7])],
)
@pytest.mark.parametrize("shape", ["4x1", "3x1/2"])
def test_an_answer_is_that_of_the_prompt_that_stays(share: Fraction, kept: list[int], shape: str):
    live = random_elastic(make_tiny_model("llama"))
    subnet = extract(live, shape)
    wanted = Decision(SubnetShape.parse(shape), Fraction(share))
    with ElasticService(
        TorchBackend(live), lambda shape, tokens: Latency(1e-3, 1e-3), decider_named("dual_head"),
        lambda request: scored(wanted),
    ) as service:  # fmt: skip
        answer = service.ask(Request(PROMPT, most=1, droppable=DROPPABLE))
        [piece] = answer
    assert (answer.decision.shape, list(answer.kept)) == (wanted.shape, kept)
    with torch.no_grad():
        row = subnet(torch.tensor([[PROMPT[each] for each in kept]])).logits[0, -1].log_softmax(-1)
    assert piece.token == int(row.argmax())
    assert piece.log_probability == pytest.approx(float(row.max()), abs=1e-5)


def test_what_nobody_reads_stays_whole_and_what_may_not_go_stays():
    live = random_elastic(make_tiny_model("llama"))

    def latency_of(shape: SubnetShape, tokens: int) -> Latency:
        return Latency(float(tokens), 1.0)

    tight = Slo.parse("ttft<=60%")  # four or fewer of eight tokens
    for reader, droppable in ((None, DROPPABLE), (lambda request: scored(), [])):
        with ElasticService(TorchBackend(live), latency_of, reader=reader) as service:
            with pytest.raises(SloError, match="no shape keeps ttft 4800 ms"):
                service.ask(Request(PROMPT, tight, most=1, droppable=droppable))
            assert list(service.ask(Request(PROMPT, most=1, droppable=droppable)).kept) == list(range(8))
    with ElasticService(TorchBackend(live), latency_of, reader=lambda request: scored()) as service:
        assert list(service.ask(Request(PROMPT, tight, most=1, droppable=DROPPABLE)).kept) == [0, 5, 6, 7]


def test_the_time_that_reading_takes_is_the_requests():
    live, now = random_elastic(make_tiny_model("llama")), [0.0]

    def reads(request: Request) -> Reading:
        now[0] += 2.0
        return scored()

    with ElasticService(
        TorchBackend(live), lambda shape, tokens: Latency(float(tokens), 1.0), reader=reads, clock=lambda: now[0]
    ) as service:
        answer = service.ask(Request(PROMPT, Slo.parse("ttft<=9s"), most=1, droppable=DROPPABLE))
        assert len(answer.kept) == 7  # and two seconds to read
        assert answer.promised.ttft == 9.0


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([1, 2], droppable=[1, 0]), "must ascend"),
        (Request([1, 2], droppable=[1, 2]), "lie in the prompt of 2 tokens"),
        (Request([1, 2], droppable=[0, 1]), "something of it has to stay"),
        (Request([1] * 60, most=5), "60 tokens of prompt and 5 of answer are 65, and the model has 64 positions"),
    ],
)
def test_impossible_prompts_are_refused(request_: Request, words: str):
    live = random_elastic(make_tiny_model("llama", max_position_embeddings=64))
    with ElasticService(TorchBackend(live), lambda shape, tokens: Latency(1.0, 1.0)) as service:
        with pytest.raises(DataError, match=words):
            service.ask(request_)
        assert service.waiting == 0


def test_a_reader_that_wants_what_is_not_feasible_gets_the_best_that_is():
    wanted: list[Feasible] = []

    def wants(feasible: Feasible) -> Decision:
        wanted.append(feasible)
        return Decision(feasible.decisions[0].shape, Fraction(99, 100))

    live = random_elastic(make_tiny_model("llama"))
    with ElasticService(
        TorchBackend(live), lambda shape, tokens: Latency(tokens * float(shape.width), shape.depth * 1.0),
        decider_named("dual_head"), lambda request: Reading(SCORES, wants),
    ) as service:  # fmt: skip
        answer = service.ask(Request(PROMPT, Slo.parse("ttft<=70%"), most=1, droppable=DROPPABLE))
    [feasible] = wanted
    assert answer.decision == max(feasible.decisions, key=lambda each: (feasible.latencies[each].tpot, each.share))
