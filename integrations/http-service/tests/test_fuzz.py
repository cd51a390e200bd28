"""Thousands of requests, most of them wrong somewhere: none brings a 500, and the server is there afterwards."""

from __future__ import annotations

import collections
import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

REQUESTS = 2000
PATHS = ("/v1/chat/completions", "/v1/completions")


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return what is right but for one time in sixteen."""
    return st.integers(0, 15).flatmap(lambda number: right if number else wrong)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
texts = mostly(st.text(max_size=30), st.text(st.sampled_from("a\ud800"), max_size=4))
words = st.text(st.sampled_from("ab <>turnsystem\n\u00e9\U0001f642"), max_size=20)
roles = st.sampled_from(["system", "user", "assistant", "developer"])
turn = st.fixed_dictionaries({"role": roles, "content": words | texts}, optional={"name": texts})
messages = st.lists(turn, max_size=4)
numbers = st.integers(-2, 40) | st.floats(-1, 3)
shares, milliseconds = mostly(st.floats(0.1, 1), numbers), mostly(st.floats(1, 1e5), numbers)
slo = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={"ttft": shares, "tpot": shares, "best_effort": st.booleans()},
    ),
    st.fixed_dictionaries({"total_ms": milliseconds}, optional={"best_effort": st.booleans()}),
    st.fixed_dictionaries(
        {},
        optional={
            "ttft": shares,
            "ttft_ms": milliseconds,
            "tpot_ms": milliseconds,
            "total_ms": milliseconds,
            "x": junk,
        },
    ),
)
fields = {
    "model": mostly(st.sampled_from(["auto", "4x1", "3x1/2", "2x3/4"]), st.sampled_from(["gpt-4", "4x", "9" * 300])),
    "max_tokens": mostly(st.integers(1, 3), numbers), "temperature": mostly(st.floats(0, 2), numbers),
    "top_p": mostly(st.floats(0.01, 1), numbers), "seed": mostly(st.integers(-9, 9), st.integers()),
    "stop": mostly(words.filter(bool) | st.lists(words.filter(bool), max_size=4), junk), "stream": st.booleans(),
    "slo": slo, "n": mostly(st.just(1), numbers), "presence_penalty": mostly(st.just(0), numbers),
    "logit_bias": mostly(st.just({}), junk), "user": texts,
    "stream_options": mostly(st.none(), st.fixed_dictionaries({}, optional={"include_usage": st.booleans()})),
}  # fmt: skip
chats = st.fixed_dictionaries(
    {"messages": mostly(messages.filter(bool), messages)},
    optional={**fields, "logprobs": st.booleans(), "top_logprobs": mostly(st.none(), st.integers(-1, 22))},
)
completions = st.fixed_dictionaries(
    {"prompt": mostly(words | texts, st.lists(st.integers(-1, 513), max_size=6))},
    optional={**fields, "context": words | texts, "logprobs": mostly(st.integers(0, 5), numbers)},
)


@st.composite
def requests(draw: Any) -> tuple[str, bytes]:
    """A path, and a body for it: right, or with a field that is junk, or with bytes that are."""
    path = draw(st.sampled_from(PATHS))
    body = draw(chats if path == PATHS[0] else completions)
    if draw(st.integers(0, 7)) == 0:
        body[draw(st.sampled_from(sorted(body)) | st.text(max_size=6))] = draw(junk)
    sent = json.dumps({"max_tokens": 3, **body}).encode()
    if draw(st.integers(0, 15)) == 0:
        at = draw(st.integers(0, len(sent)))
        sent = sent[:at] + draw(st.binary(max_size=3)) + sent[at + draw(st.integers(0, 3)) :]
    return path, sent


def test_no_request_brings_a_500(server: Any):
    seen: collections.Counter[int] = collections.Counter()

    @given(requests())
    @settings(
        max_examples=REQUESTS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def one(request: tuple[str, bytes]) -> None:
        path, body = request
        response = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        seen[response.status_code] += 1
        assert response.status_code in (200, 400, 404, 415, 422, 429), response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")

    one()
    assert sum(seen.values()) >= REQUESTS
    assert min(seen[200], seen[422]) > REQUESTS / 10, seen
    server.until(lambda: server.figure("amoeba_queue_requests") == 0)
    assert server.http.get("/health").json()["status"] == "ok"
    assert "Traceback" not in "".join(server.said)
