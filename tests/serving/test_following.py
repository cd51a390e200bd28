"""What a server needs of the service: pieces that are told, alternatives, a shape that a request names, the backlog."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from amoeba_plugin.errors import BusyError, ShapeError, SloError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.serving.answer import Piece, Request
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency, Slo
from amoeba_plugin.shape import SubnetShape
from support.models import make_tiny_model, random_elastic

PROMPT = [5, 9, 31]


class Gated(TorchBackend):
    """One whose prompts wait for a gate."""

    gate: threading.Event
    begun: threading.Event

    def prefill(self, *given: object) -> tuple[object, Tensor]:
        self.begun.set()
        assert self.gate.wait(60)
        return super().prefill(*given)


@pytest.fixture
def backend() -> Gated:
    found = Gated(random_elastic(make_tiny_model("llama")))
    found.gate, found.begun = threading.Event(), threading.Event()
    return found


@pytest.fixture
def service(backend: Gated) -> Iterator[ElasticService]:
    takes = {shape: Latency(8.0, 2.0 * shape.depth) for shape in backend.space}
    with ElasticService(backend, lambda shape, _: takes[shape], clock=lambda: 0.0) as found:
        yield found
        backend.gate.set()


def test_pieces_are_told_as_they_come_those_before_too_and_none_twice(backend: Gated, service: ElasticService):
    answer, told, over = service.ask(Request(PROMPT, most=5)), [], threading.Event()

    def tell(piece: Piece | None) -> None:
        told.append(piece)
        if piece is None:
            over.set()

    backend.gate.set()
    next(iter(answer))
    answer.follow(tell)
    assert over.wait(60)
    assert [type(piece) for piece in told] == [Piece] * 4 + [type(None)]
    late: list[Piece | None] = []
    again = service.ask(Request(PROMPT, most=5))
    assert again.wait(60)
    again.follow(late.append)
    assert late[1:] == told
    assert again.end == "length"


def test_alternatives_are_the_likeliest_tokens_of_the_shape(backend: Gated, service: ElasticService):
    backend.gate.set()
    shape = SubnetShape.parse("3x1/2")
    (piece,) = service.ask(Request(PROMPT, most=1, shape=shape, alternatives=4))
    with torch.no_grad():
        expected = extract(random_elastic(make_tiny_model("llama")), shape)(torch.tensor([PROMPT])).logits[0, -1]
    row = expected.log_softmax(-1)
    order = row.argsort(descending=True)[:4]
    assert [token for token, _ in piece.alternatives] == order.tolist()
    assert [value for _, value in piece.alternatives] == pytest.approx(row[order].tolist(), abs=1e-4)
    assert piece.alternatives[0] == (piece.token, pytest.approx(piece.log_probability))
    (plain,) = service.ask(Request(PROMPT, most=1))
    assert plain.alternatives == []


def test_a_named_shape_is_what_a_request_gets_or_the_reason_why_not(backend: Gated, service: ElasticService):
    smallest = backend.space.smallest
    assert service.ask(Request(PROMPT, shape=smallest)).decision.shape == smallest
    with pytest.raises(SloError, match=f"the nearest, {backend.space.largest} "):
        service.ask(Request(PROMPT, Slo.parse("tpot<=5s"), shape=backend.space.largest))
    late = service.ask(Request(PROMPT, Slo.parse("tpot<=5s"), shape=backend.space.largest, best_effort=True))
    assert (late.decision.shape, late.in_time) == (backend.space.largest, False)
    with pytest.raises(ShapeError, match="outside the space"):
        service.ask(Request(PROMPT, shape=SubnetShape.parse("7x1")))
    backend.gate.set()


def test_the_backlog_is_what_is_left_of_all_that_was_taken(backend: Gated, service: ElasticService):
    assert service.backlog == 0
    taken = [service.ask(Request(PROMPT, most=3, shape=backend.space.largest)) for _ in range(2)]
    assert backend.begun.wait(60)
    assert service.backlog == pytest.approx(2 * (8 + 2 * 8))  # the clock stands still
    with pytest.raises(BusyError, match="2 requests were taken before"):
        service.ask(Request(PROMPT, Slo.parse("ttft<=9s"), most=3))
    backend.gate.set()
    for each in taken:
        assert each.wait(60)
    assert service.backlog == 0


def test_switches_of_shape_are_counted(backend: Gated, service: ElasticService):
    backend.gate.set()
    for shape in (backend.space.largest, backend.space.smallest, backend.space.smallest, backend.space.largest):
        assert service.ask(Request(PROMPT, shape=shape, most=2)).wait(60)
    assert backend.switches == 2
