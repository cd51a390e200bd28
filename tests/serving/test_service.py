"""The service against every shape's own checkpoint alone, and, on a clock that its steps advance, against its word."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from amoeba_plugin.errors import DataError, ServiceError, SloError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.serving.feasible import Decision
from amoeba_plugin.serving.sampling import Sampler, Sampling
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency, Slo
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.testing.random_models import attach_random_smol
from support.models import make_tiny_model, random_elastic
from support.serving import SPACE, Clocked, asked, latency_of, service_of


def alone(subnet: PreTrainedModel, prompt: Sequence[int], count: int) -> list[tuple[int, float]]:
    """Return greedy tokens and their log-probabilities by the whole sequence anew for each, without a cache."""
    tokens, found = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            row = subnet(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(row.argmax()))
            found.append((tokens[-1], float(row.max())))
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_answers_computed_step_by_step_between_others_are_those_of_each_subnet_alone(adapted: bool):
    live = random_elastic(make_tiny_model("llama"))
    if adapted:
        attach_random_smol(live)
    shapes = itertools.cycle(["4x1", "3x1/2", "2x3/4", "4x1/2"])
    taken = [next(shapes) for _ in range(8)]
    subnets = {shape: extract(live, shape) for shape in set(taken)}
    prompts = [[5 + number, 9, 31, 2, 77][: 2 + number % 4] for number in range(8)]
    order = iter(taken)
    decider: Callable[..., Decision] = lambda found, reading: Decision(SubnetShape.parse(next(order)))  # noqa: E731
    with ElasticService(TorchBackend(live), lambda shape, tokens: Latency(1e-3, 1e-3), decider) as service:
        answers = [service.ask(Request(prompt, most=6)) for prompt in prompts]
        pieces = [list(answer) for answer in answers]
    for answer, shape, prompt, found in zip(answers, taken, prompts, pieces, strict=True):
        assert str(answer.decision.shape) == shape
        expected = alone(subnets[shape], prompt, 6)
        assert [piece.token for piece in found] == [token for token, _ in expected]
        assert [piece.log_probability for piece in found] == pytest.approx([row for _, row in expected], abs=1e-4)
        assert answer.end == "length"
        assert list(answer) == []


@given(
    st.lists(asked, min_size=1, max_size=12),
    st.sampled_from([None, Decision(SubnetShape(2, Fraction(1)))]),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_nothing_that_was_taken_is_late_in_silence(requests: list[Request], wanted: Decision | None, at_once: int):
    backend, answers, refused = Clocked(at_once=at_once), [], 0
    with service_of(backend, decider=lambda found, reading: wanted) as service:
        for request in requests:
            try:
                answers.append((request, service.ask(request)))
            except SloError:
                refused += 1
                assert not request.best_effort
        backend.gate.set()
    assert all(2 <= together <= at_once for together in backend.batches)
    for request, answer in answers:
        pieces, measured = list(answer), answer.measured
        assert measured is not None
        assert (len(pieces), answer.end) == (request.most, "length")
        if answer.in_time:
            whole = latency_of(SPACE.largest, len(request.tokens))
            assert request.slo.limits(whole).kept_by(Latency(measured.ttft - 1e-6, measured.tpot - 1e-6), request.most)
        else:
            assert request.best_effort
    assert refused + len(answers) == len(requests)


def test_a_busy_service_gives_what_is_left_or_says_so_at_once():
    backend = Clocked()
    with service_of(backend) as service:
        first = service.ask(Request([1] * 10, Slo.parse("total<=100s"), 10))
        assert first.decision.shape == SPACE.largest  # 10 * 4 + 9 * 4 seconds
        second = service.ask(Request([1] * 10, Slo.parse("total<=100s"), 10))
        assert second.decision.shape == SPACE.smallest  # 19 seconds fit behind it, no more
        with pytest.raises(SloError, match="2 requests were taken before, and behind them no shape keeps its targets"):
            service.ask(Request([1] * 10, Slo.parse("total<=100s"), 10))
        late = service.ask(Request([1] * 10, Slo.parse("total<=100s"), 10, best_effort=True))
        assert (late.in_time, late.decision.shape) == (False, SPACE.smallest)
        assert late.promised.ttft > 100
        with pytest.raises(SloError, match=r"the nearest, 2x1/2 on 100% of the prompt, takes 1e\+04 ms to the first"):
            service.ask(Request([1] * 10, Slo.parse("ttft<=1ms")))
        backend.gate.set()
    for answer in (first, second):
        assert answer.measured is not None
        assert answer.measured.total(10) <= 100


def test_a_whole_share_of_the_whole_models_time_is_kept_by_the_whole_model_however_late_it_is_looked_at():
    backend, ticks = Clocked(), itertools.count()
    backend.gate.set()
    with ElasticService(backend, latency_of, clock=lambda: backend.now + 1e-5 * next(ticks)) as service:
        answer = service.ask(Request([1] * 7, Slo.parse("ttft<=100% tpot<=100%"), 3))
        assert (answer.decision.shape, answer.in_time) == (SPACE.largest, True)


def test_what_nobody_wants_any_more_ends_within_a_step_and_what_fails_ends_alone():
    backend = Clocked(fails=(7,))
    backend.gate.set()
    with service_of(backend) as service:
        long = service.ask(Request([1], most=10**6))
        pieces = iter(long)
        next(pieces), next(pieces)
        long.cancel()
        assert long.wait(60)
        assert long.end == "cancelled"
        long.cancel()
        broken = service.ask(Request([7], most=3))
        assert list(broken) == []
        assert (broken.end, broken.error, broken.measured) == ("failed", "RuntimeError: out of memory", None)
        assert len(list(service.ask(Request([1], most=3)))) == 3
        assert service.waiting == 0


def test_tokens_that_end_an_answer_are_no_part_of_it():
    backend = Clocked()
    backend.gate.set()
    with service_of(backend) as service:
        answer = service.ask(Request([3, 4], most=30, ends=[5, 49]))  # its tokens are 3, then lengths: 3, 4, 5
        assert [piece.token for piece in answer] == [3, 3, 4]
        assert answer.end == "stop"


def test_a_service_that_is_full_or_closed_takes_nothing():
    backend = Clocked()
    service = service_of(backend, most_waiting=2)
    answers = [service.ask(Request([1], most=4)) for _ in range(2)]
    with pytest.raises(ServiceError, match="2 requests are waiting, as many as may"):
        service.ask(Request([1]))
    with pytest.raises(DataError, match="a token of prompt at least"):
        ElasticService(Clocked(), latency_of).ask(Request([]))
    closing = threading.Thread(target=service.close, args=[False])
    closing.start()
    backend.gate.set()
    closing.join(60)
    assert {answer.end for answer in answers} == {"cancelled"}
    with pytest.raises(ServiceError, match="is closing"):
        service.ask(Request([1]))


def test_draws_follow_the_models_probabilities_and_a_seed_repeats_them():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=3))
    drawn = [sampler.draw(logits)[0] for _ in range(4000)]
    for token, probability in enumerate(logits.softmax(-1).tolist()):
        assert drawn.count(token) / 4000 == pytest.approx(probability, abs=0.03)
    again = Sampler(Sampling(temperature=1.0, seed=3))
    assert [again.draw(logits)[0] for _ in range(50)] == drawn[:50]
    assert {Sampler(Sampling(1.0, top_k=1)).draw(logits)[0] for _ in range(20)} == {0}
    assert {Sampler(Sampling(5.0, top_p=0.3)).draw(logits)[0] for _ in range(20)} == {0}
    assert Sampler(Sampling(0.5)).draw(logits)[1] in logits.log_softmax(-1).tolist()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"seed": -5}]
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]):
    with pytest.raises(DataError, match=f"impossible sampling: {next(iter(wrong))}"):
        Sampling(**wrong)  # type: ignore[arg-type]
