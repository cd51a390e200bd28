"""64 clients at once: nothing is lost or mixed up, and memory stays flat."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import httpx
import psutil
import pytest

from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.model import ElasticModel

CLIENTS, TOKENS, PROMPTS = 64, 6, 24
SHAPES = ("4x1", "3x1/2", "2x3/4")
GROWTH = 48 * 2**20  # bytes, that allocators may still take once all clients were answered some times


@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_sixty_four_clients_get_each_their_own_answer(
    server: Any, live: ElasticModel, known: Any, alone: Any, seconds: int
):
    prompts = [known(text)["input_ids"][: 6 + number] for number, text in enumerate(shipped_texts().all[:PROMPTS])]
    expected = {}
    for shape in SHAPES:
        with live.active(shape) as model:
            for number, prompt in enumerate(prompts):
                expected[shape, number] = [value for _, value in alone(model, prompt, TOKENS)]
    asked = list(itertools.product(SHAPES, range(PROMPTS)))
    process, memory = psutil.Process(server.process.pid), []
    before = server.figure("amoeba_tokens_total", of="answer")

    async def client(http: httpx.AsyncClient, first: int, until: float) -> list[tuple[Any, Any]]:
        found, turns = [], itertools.count(first * 7)
        while time.perf_counter() < until:
            key = asked[next(turns) % len(asked)]
            body = {"model": key[0], "prompt": prompts[key[1]], "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}
            found.append((key, await http.post("/v1/completions", json=body)))
            if first == 0:
                memory.append(process.memory_info().rss)
        return found

    async def all_of_them() -> list[tuple[Any, Any]]:
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            until = time.perf_counter() + seconds
            done = await asyncio.gather(*(client(http, number, until) for number in range(CLIENTS)))
        return [each for found in done for each in found]

    answers = asyncio.run(all_of_them())
    assert {response.status_code for _, response in answers} == {200}
    assert len(answers) >= CLIENTS
    bodies = [(key, response.json()) for key, response in answers]
    assert len({body["id"] for _, body in bodies}) == len(bodies)
    for (shape, number), body in bodies:
        assert body["amoeba"]["shape"] == shape
        told = body["choices"][0]["logprobs"]["token_logprobs"]
        assert told == pytest.approx(expected[shape, number][: len(told)], abs=1e-4)
        assert body["choices"][0]["finish_reason"] == ("length" if len(told) == TOKENS else "stop")
    produced = sum(body["usage"]["completion_tokens"] for _, body in bodies)
    assert server.figure("amoeba_tokens_total", of="answer") == before + produced
    assert server.figure("amoeba_queue_requests") == 0
    warm = memory[min(len(memory) // 3, 3)]
    assert memory[-1] - warm < GROWTH, [each >> 20 for each in memory]
    print(f"{len(answers)} answers of {CLIENTS} clients in {seconds} s; memory {warm >> 20} -> {memory[-1] >> 20} MiB")  # noqa: T201
