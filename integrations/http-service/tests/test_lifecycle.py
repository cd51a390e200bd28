"""Clients that go away, a server that is told to end, one that is killed, and files that nothing changes."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

LONG = {"model": "4x1", "prompt": "The moon is", "max_tokens": 400, "temperature": 0, "logprobs": 0}


def digests(directory: Path) -> dict[str, str]:
    files = [each for each in directory.rglob("*") if each.is_file()]
    return {str(each): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def test_a_client_that_goes_away_is_cancelled_in_a_stream_or_not(server: Any):
    cancelled = server.figure("amoeba_answers_total", shape="4x1", end="cancelled")
    stream = server.openai.completions.create(stream=True, **LONG)
    next(iter(stream))
    stream.close()
    server.until(lambda: server.figure("amoeba_answers_total", shape="4x1", end="cancelled") == cancelled + 1)
    with httpx.Client(base_url=server.url) as gone, pytest.raises(httpx.ReadTimeout):
        gone.post("/v1/completions", json=LONG, timeout=httpx.Timeout(60, read=0.05))
    server.until(lambda: server.figure("amoeba_answers_total", shape="4x1", end="cancelled") == cancelled + 2)
    assert server.figure("amoeba_queue_requests") == 0
    said = server.openai.completions.create(**{**LONG, "max_tokens": 2})
    assert said.usage.completion_tokens == 2


def test_an_ended_server_finishes_what_runs_and_a_killed_one_starts_again(start: Any, elastic: Path):
    before = digests(elastic.parent)
    with start() as killed:
        stream = killed.openai.completions.create(stream=True, **LONG)
        pieces = iter(stream)
        next(pieces)
        killed.process.kill()
        killed.process.wait(60)
        with pytest.raises(openai.APIConnectionError):
            list(pieces)
    assert digests(elastic.parent) == before
    with start() as again:
        stream = again.openai.completions.create(stream=True, **LONG)
        told: list[Any] = []
        reader = threading.Thread(target=lambda: told.extend(stream))
        next(iter(stream))
        reader.start()
        os.kill(again.process.pid, signal.SIGTERM)
        reader.join(120)
        assert again.process.wait(60) == 0
        assert told[-1].choices[0].finish_reason in ("length", "stop")
        assert told[-1].amoeba["measured"]["ttft_ms"] > 0
        assert "Traceback" not in "".join(again.said)
        assert "ended; what ran was finished" in "".join(again.said)
    assert digests(elastic.parent) == before


def test_a_second_interrupt_does_not_wait_for_what_runs(start: Any):
    with start() as server:
        stream = iter(server.openai.completions.create(stream=True, **{**LONG, "max_tokens": 500}))
        next(stream)
        os.kill(server.process.pid, signal.SIGINT)
        server.until(lambda: _refuses(server.url))  # it has seen the first one
        assert server.process.poll() is None
        os.kill(server.process.pid, signal.SIGINT)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
        assert server.process.wait(60) == 0
    assert "cut off" in "".join(server.said)


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=5)
    except httpx.ConnectError:
        return True
    return False
