"""Several requests in one step: against each alone, in every architecture whose cache keeps all, and in the service."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.backend import AT_ONCE, TorchBackend
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency, Slo
from amoeba_plugin.testing.random_models import attach_random_smol, random_model, random_strategy
from support.architectures import CONFIGS
from support.models import make_tiny_model, random_elastic
from support.serving import SPACE, Clocked, latency_of, service_of

NO_WINDOW = {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 4}
FORGETFUL = ["gemma2", "gemma3_text"]  # some of their layers always attend within a window


def live_model(name: str, **more: Any) -> ElasticModel:
    model = random_model(CONFIGS[name] | more)
    return ElasticModel(model, random_strategy(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_remembers_all_of_an_answer_computes_several(name: str) -> None:
    expected = 1 if name in (*FORGETFUL, "mistral", "phi3", "qwen2", "qwen3", "smollm3") else AT_ONCE
    assert TorchBackend(live_model(name)).at_once == expected


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FORGETFUL])
def test_requests_of_one_step_get_what_each_gets_alone(name: str) -> None:
    live = live_model(name, **(NO_WINDOW if "sliding_window" in CONFIGS[name] else {}))
    if name == "llama":
        attach_random_smol(live)
    backend = TorchBackend(live)
    assert backend.at_once == AT_ONCE
    draw = random.Random(3)
    for shape in live.space:
        prompts = [[draw.randrange(3, 90) for _ in range(length)] for length in (1, 9, 4)]
        alone = [backend.prefill(shape, prompt)[0] for prompt in prompts]
        several = [backend.prefill(shape, prompt)[0] for prompt in prompts]
        for _ in range(3):
            tokens = [draw.randrange(3, 90) for _ in prompts]
            expected = [backend.step(shape, cache, token) for cache, token in zip(alone, tokens, strict=True)]
            found = backend.steps(shape, several, tokens)
            for logits, other in zip(found, expected, strict=True):
                torch.testing.assert_close(logits, other, rtol=0, atol=2e-5 * float(other.abs().max().clamp(min=1)))


def test_the_service_computes_patient_requests_together_and_each_answer_is_its_own() -> None:
    live = random_elastic(make_tiny_model("llama"))
    prompts = [[5 + number, 9, 31, 2, 77][: 2 + number % 4] for number in range(12)]
    shape = live.space.largest
    backend, seen = TorchBackend(live), []
    steps = backend.steps
    backend.steps = lambda shape, caches, tokens: seen.append(len(tokens)) or steps(shape, caches, tokens)
    with ElasticService(backend, lambda shape, tokens: Latency(1e-3, 1e-3)) as service:
        answers = [service.ask(Request(prompt, most=6, shape=shape)) for prompt in prompts]
        pieces = [list(answer) for answer in answers]
    assert max(seen) == AT_ONCE
    plain = TorchBackend(live)
    for prompt, found in zip(prompts, pieces, strict=True):
        cache, logits = plain.prefill(shape, prompt)
        for piece in found:
            row = logits.log_softmax(-1)
            assert piece.token == int(row.argmax())
            assert piece.log_probability == pytest.approx(float(row.max()), abs=1e-4)
            logits = plain.step(shape, cache, piece.token)


def test_a_step_that_fails_together_is_computed_one_by_one() -> None:
    backend = Clocked(at_once=4)
    with service_of(backend) as service:
        answers = [service.ask(Request([49, *[1] * number], Slo(), 5)) for number in range(3)]
        backend.gate.set()
    assert [len(list(answer)) for answer in answers] == [5, 5, 5]
    assert {answer.end for answer in answers} == {"length"}


def test_patient_requests_share_steps_and_take_less_time() -> None:
    took = {}
    for at_once in (1, 4):
        backend = Clocked(at_once=at_once)
        with service_of(backend) as service:
            for _ in range(4):
                service.ask(Request([1], Slo(), 9))
            backend.gate.set()
        took[at_once] = backend.now
    whole = latency_of(SPACE.largest, 1)
    assert took[1] == pytest.approx(4 * whole.total(9))
    assert took[4] == pytest.approx(4 * whole.ttft + 8 * whole.tpot * (4 - 3 / 2))
