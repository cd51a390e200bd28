"""What is refused, with which status, in OpenAI's form; and who may ask."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest

CHAT = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 2}
TEXT = {"prompt": "The moon is", "max_tokens": 2}
LONG = {"prompt": "The moon is", "max_tokens": 300, "temperature": 0, "logprobs": 0}

WRONG: list[tuple[dict[str, Any], int, str, str]] = [
    ({"sloo": {}}, 422, "unknown_field", "there is no field 'sloo'. Did you mean 'slo'?"),
    ({"slo": {"ttft_s": 1}}, 422, "unknown_field", "there is no field slo.ttft_s"),
    ({"slo": {"ttft": 2}}, 422, "invalid_field", "slo.ttft: input should be less than or equal to 1"),
    ({"slo": {"ttft": 0.5, "ttft_ms": 5}}, 422, "slo_not_possible", "names ttft as a share and in milliseconds"),
    ({"slo": {"total_ms": 5, "tpot": 1}}, 422, "slo_not_possible", "name the total beside its parts"),
    ({"slo": {"tpot_ms": "5"}}, 422, "invalid_field", "slo.tpot_ms: input should be a valid number"),
    ({"slo": {"tpot_ms": True}}, 422, "invalid_field", "slo.tpot_ms: input should be a valid number"),
    ({"temperature": 2.5}, 422, "invalid_field", "temperature: input should be less than or equal to 2"),
    ({"top_p": 0}, 422, "invalid_field", "top_p: input should be greater than 0"),
    ({"max_tokens": 0}, 422, "invalid_field", "max_tokens: input should be greater than or equal to 1"),
    ({"max_tokens": 1025}, 422, "invalid_request", "an answer of 1025 tokens is asked for, and may have 1024"),
    ({"max_tokens": 600}, 422, "invalid_request", "the model has 512 positions; shorten the prompt"),
    ({"stop": ["a"] * 5}, 422, "invalid_field", "stop"),
    ({"stop": ""}, 422, "invalid_field", "stop"),
    ({"n": 2}, 422, "invalid_field", "n: is not supported by this server at this value; leave it out"),
    ({"stream_options": {"include_usage": True}}, 422, "invalid_request", "stream_options belong to a stream"),
    ({"model": "12x"}, 404, "model_not_found", "no model named '12x': there are auto, and the shapes"),
    ({"seed": 1.5}, 422, "invalid_field", "seed: input should be a valid integer"),
]
WRONG_CHATS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"messages": []}, 422, "invalid_field", "messages: list should have at least 1 item"),
    (
        {"messages": [{"role": "robot", "content": "Hi"}]},
        422,
        "invalid_field",
        "messages.0.role: input should be 'system'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "invalid_field", "messages.0.content"),
    ({"chat_template": "{{ 1 }}"}, 422, "unknown_field", "there is no field 'chat_template'"),
    ({"max_completion_tokens": 3}, 422, "invalid_request", "max_tokens is 2 and max_completion_tokens 3; send one"),
    ({"top_logprobs": 2}, 422, "invalid_request", "top_logprobs belong to logprobs"),
    ({"top_logprobs": 21}, 422, "invalid_field", "top_logprobs"),
    ({"tools": [{"type": "function"}]}, 422, "invalid_field", "tools: is not supported"),
]
WRONG_TEXTS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": ""}, 422, "invalid_request", "a request has a token of prompt at least"),
    (
        {"prompt": [1, 512]},
        422,
        "invalid_request",
        "token 512 of the prompt is none of this model's: they are 0 to 511",
    ),
    ({"prompt": [1], "context": "a"}, 422, "invalid_request", "a context stands in front of a text"),
    ({"prompt": ["a", "b"]}, 422, "invalid_field", "prompt"),
    ({"echo": True}, 422, "invalid_field", "echo: is not supported"),
    ({"logprobs": 6}, 422, "invalid_field", "logprobs: input should be less than or equal to 5"),
]


def refused(response: Any) -> dict[str, Any]:
    told = response.json()
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    return told["error"]


@pytest.mark.parametrize(
    ("path", "body", "wrong"),
    [
        *[("/v1/chat/completions", CHAT, each) for each in (*WRONG, *WRONG_CHATS)],
        *[("/v1/completions", TEXT, each) for each in (*WRONG, *WRONG_TEXTS)],
    ],
    ids=lambda value: json.dumps(value[0]) if isinstance(value, tuple) else None,
)
def test_a_wrong_field_is_named_with_what_is_possible(server: Any, path: str, body: dict[str, Any], wrong: Any):
    changed, status, code, words = wrong
    response = server.http.post(path, json={**body, **changed})
    error = refused(response)
    assert (response.status_code, error["code"]) == (status, code), error
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b'{"prompt": "a"', "application/json", 400, "invalid_json"),
        (b'{"prompt": "\xff"}', "application/json", 400, "bad_request"),
        (b"[" * 50_000, "application/json", 400, "bad_request"),
        (b'{"prompt": "a"}', "text/plain", 415, "invalid_body"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "invalid_body"),
        (b"[]", "application/json", 415, "invalid_body"),
        (b"", "application/json", 422, "invalid_body"),
        (b'{"prompt": "\\ud800"}', "application/json", 422, "invalid_request"),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json", 422, "invalid_field"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 422, "invalid_field"),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json", 422, "invalid_field"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "application/json", 400, "bad_request"),
    ],
)
def test_a_body_that_is_none_is_refused(server: Any, body: bytes, kind: str, status: int, code: str):
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
    assert (response.status_code, refused(response)["code"]) == (status, code), response.text


def test_paths_and_methods_that_there_are_not(server: Any):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/page/x.js", 404),
    ):
        response = server.http.request(method, path)
        assert response.status_code == status
        assert refused(response)["type"] == "invalid_request_error"
    assert server.http.get("/page/..%2fapp.py").status_code == 404


def test_what_may_be_asked_is_described(server: Any):
    described = server.http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= described["paths"].keys()
    fields = described["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "slo", "stream", "max_completion_tokens"} <= fields.keys()
    assert server.http.get("/docs").status_code == 404  # it would bring scripts of other hosts


def test_a_page_of_another_host_gets_nothing(server: Any):
    """Its name may have been made to mean this machine."""
    response = server.http.get("/v1/models", headers={"Host": "evil.example:8000"})
    assert (response.status_code, refused(response)["code"]) == (403, "wrong_host")
    assert server.http.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    allowed = server.http.options("/v1/completions", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in allowed.headers


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Basic a-token-of-this-test", "Bearer \xe9"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/completions", "/openapi.json"])
def test_without_the_token_nothing_is_told(strict: Any, given: str | None, path: str):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    response = strict.http.request("GET", path, headers={"Authorization": "", **headers})
    assert response.status_code == 401
    assert refused(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_with_the_token_or_for_the_page_alone_there_is_an_answer(strict: Any):
    assert strict.openai.models.list().data[0].id == "auto"
    assert strict.http.get("/health", headers={"Authorization": ""}).status_code == 200
    assert "amoeba" in strict.http.get("/", headers={"Authorization": ""}).text
    with pytest.raises(openai.AuthenticationError, match="AMOEBA_SERVE_TOKEN"):
        strict.openai.with_options(api_key="wrong").models.list()


def test_what_is_too_large_is_refused(strict: Any):
    body = {**TEXT, "context": "a" * 5000}
    response = strict.http.post("/v1/completions", json=body)
    assert (response.status_code, refused(response)["code"]) == (413, "body_too_large")
    chunks = iter([json.dumps(body).encode()[:3000], json.dumps(body).encode()[3000:]])  # says no length before
    response = strict.http.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    with pytest.raises(openai.UnprocessableEntityError, match=r"the prompt has \d+ tokens, and may have 120"):
        strict.openai.completions.create(model="auto", prompt="red stone " * 100)
    with pytest.raises(openai.UnprocessableEntityError, match="of 301 tokens is asked for, and may have 300"):
        strict.openai.completions.create(model="auto", prompt="a", max_tokens=301)


def test_more_than_may_wait_are_told_to_come_again(strict: Any):
    """Three are taken; the fourth is refused at once, and taken once they are done."""
    streams = [strict.openai.completions.create(model="auto", stream=True, **LONG) for _ in range(3)]
    with pytest.raises(openai.RateLimitError, match="3 requests are waiting, as many as may") as refusal:
        strict.openai.completions.create(model="auto", **TEXT)
    assert refusal.value.code == "too_many_waiting"
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 600
    with pytest.raises(openai.RateLimitError) as busy:
        strict.openai.completions.create(model="auto", extra_body={"slo": {"total_ms": 1000}}, **TEXT)
    assert busy.value.code == "too_many_waiting"
    lengths: list[int] = []
    readers = [threading.Thread(target=lambda s=stream: lengths.append(len(list(s)))) for stream in streams]
    for each in readers:
        each.start()
    for each in readers:
        each.join(120)
    assert len(lengths) == 3
    strict.until(lambda: strict.figure("amoeba_queue_requests") == 0)
    assert strict.openai.completions.create(model="auto", **TEXT).usage.completion_tokens <= 2
    assert strict.figure("amoeba_refused_total", code="too_many_waiting") >= 2


def test_targets_that_only_the_queue_breaks_are_told_apart(server: Any):
    with server.openai.completions.create(model="4x1", stream=True, **{**LONG, "max_tokens": 400}) as stream:
        next(iter(stream))
        with server.openai.completions.create(
            model="4x1", stream=True, extra_body={"slo": {"total_ms": 900}}, **{**LONG, "max_tokens": 400}
        ) as second:
            with pytest.raises(openai.RateLimitError, match="behind them no shape keeps its targets") as busy:
                server.openai.completions.create(
                    model="4x1", extra_body={"slo": {"total_ms": 850}}, **{**LONG, "max_tokens": 400}
                )
            assert busy.value.code == "slo_busy"
            assert int(busy.value.response.headers["retry-after"]) >= 1
            second.close()
    server.until(lambda: server.figure("amoeba_queue_requests") == 0)
