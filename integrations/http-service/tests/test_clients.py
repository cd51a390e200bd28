"""A started server, driven by the official client, by httpx and by curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import openai
import pytest

from amoeba_plugin.elastic.model import ElasticModel

CHAT = [
    {"role": "system", "content": "The moon is old."},
    {"role": "user", "content": "What is it?"},
]
SHAPE = "3x1/2"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def rendered(known: Any, messages: list[dict[str, str]]) -> list[int]:
    text = known.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return known(text, add_special_tokens=False)["input_ids"]


def test_a_chat_is_what_the_shape_says_of_what_the_template_writes(
    server: Any, live: ElasticModel, known: Any, alone: Any
):
    said = server.openai.chat.completions.create(model=SHAPE, messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY)
    prompt = rendered(known, CHAT)
    with live.active(SHAPE) as model:
        expected = alone(model, prompt, 12)
    choice = said.choices[0]
    ends = {known.eos_token_id}
    expected = expected[: next((at for at, (token, _) in enumerate(expected) if token in ends), 12)]
    assert choice.message.role == "assistant"
    assert choice.message.content == known.decode([token for token, _ in expected], skip_special_tokens=True)
    told = choice.logprobs.content
    assert [each.token for each in told] == [known.decode([token]) for token, _ in expected]
    assert [each.logprob for each in told] == pytest.approx([value for _, value in expected], abs=1e-4)
    assert all(each.top_logprobs[0].logprob == each.logprob and len(each.top_logprobs) == 3 for each in told)
    assert said.usage.prompt_tokens == len(prompt)
    assert said.usage.completion_tokens == len(expected)
    assert said.usage.total_tokens == len(prompt) + len(expected)
    assert said.model == SHAPE
    got = said.amoeba
    assert got["shape"] == SHAPE
    assert got["prompt"] == {
        "tokens": len(prompt), "kept": len(prompt), "share": 1.0, "positions": [[0, len(prompt)]], "dropped": [],
    }  # fmt: skip
    assert got["promised"]["ttft_ms"] > 0
    assert got["measured"]["tpot_ms"] > 0


def test_a_stream_says_the_same_piece_by_piece_and_what_it_got_in_front_and_at_the_end(server: Any):
    asked = {"model": SHAPE, "messages": CHAT, "logprobs": True, **GREEDY}
    whole = server.openai.chat.completions.create(**asked)
    stream = server.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    *pieces, last, usage = chunks
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == whole.choices[0].message.content
    tokens = [token for each in pieces if each.choices[0].logprobs for token in each.choices[0].logprobs.content]
    assert [(each.token, each.logprob) for each in tokens] == [
        (each.token, pytest.approx(each.logprob, abs=1e-5)) for each in whole.choices[0].logprobs.content
    ]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert chunks[0].amoeba["measured"] is None
    assert last.amoeba["measured"]["ttft_ms"] > 0
    assert usage.amoeba == last.amoeba
    assert {each.id for each in chunks} == {chunks[0].id}


def test_a_completion_goes_on_with_a_text_or_with_tokens(server: Any, live: ElasticModel, known: Any, alone: Any):
    ask = server.openai.completions.create
    said = ask(model="auto", prompt="The moon is", logprobs=2, **GREEDY)
    prompt = known("The moon is")["input_ids"]
    expected = alone(live.model, prompt, 12)
    shown = said.choices[0].logprobs
    assert shown.token_logprobs == pytest.approx([value for _, value in expected][: len(shown.tokens)], abs=1e-4)
    assert [len(each) for each in shown.top_logprobs] == [2] * len(shown.tokens)
    assert "".join(shown.tokens) == said.choices[0].text
    assert [
        said.choices[0].text[at:].startswith(token) for at, token in zip(shown.text_offset, shown.tokens, strict=True)
    ]
    assert ask(model="auto", prompt=prompt, **GREEDY).choices[0].text == said.choices[0].text
    both = ask(model="auto", prompt=" is", extra_body={"context": "The moon"}, **GREEDY)
    assert (both.choices[0].text, both.usage) == (said.choices[0].text, said.usage)


def test_targets_get_a_shape_that_keeps_them_and_best_effort_what_there_is(server: Any):
    ask = server.openai.chat.completions.create
    whole = ask(model="auto", messages=CHAT, **GREEDY).amoeba
    assert whole["shape"] == "4x1"
    tight = ask(model="auto", messages=CHAT, extra_body={"slo": {"tpot": 0.7}}, **GREEDY).amoeba
    assert tight["shape"] != "4x1"
    assert tight["promised"]["tpot_ms"] <= 0.7 * whole["promised"]["tpot_ms"] * 1.01
    late = ask(
        model="auto", messages=CHAT, extra_body={"slo": {"tpot_ms": 0.001, "best_effort": True}}, **GREEDY
    ).amoeba
    assert late["in_time"] is False
    with pytest.raises(openai.UnprocessableEntityError, match="no shape keeps tpot 0.001 ms: the nearest") as refused:
        ask(model="auto", messages=CHAT, extra_body={"slo": {"tpot_ms": 0.001}}, **GREEDY)
    assert (refused.value.code, refused.value.param) == ("slo_not_possible", "slo")


def test_models_are_auto_and_every_shape_by_name(server: Any):
    listed = [each.id for each in server.openai.models.list()]
    assert listed[0] == "auto"
    assert len(listed) == 10
    assert listed[1:3] == ["4x1", "4x3/4"]
    for name in ("auto", SHAPE):
        assert server.openai.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="no model named 'gpt-4': there are auto"):
        server.openai.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as unknown:
        server.openai.chat.completions.create(model="9x1", messages=CHAT)
    assert unknown.value.code == "model_not_found"


def test_a_stop_string_ends_an_answer_without_any_part_of_it(server: Any):
    ask = server.openai.completions.create
    asked: dict[str, Any] = {"model": SHAPE, "prompt": "The moon is", "temperature": 0, "max_tokens": 40, "logprobs": 0}
    text = ask(**asked).choices[0].text
    stop = text[9:13]
    cut = ask(**asked, stop=["never this", stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert "".join(cut.choices[0].logprobs.tokens).startswith(cut.choices[0].text)
    shown = ""
    for chunk in ask(**asked, stop=stop, stream=True):
        shown += chunk.choices[0].text
        assert cut.choices[0].text.startswith(shown)
    assert shown == cut.choices[0].text
    server.until(lambda: server.figure("amoeba_queue_requests") == 0)


def test_a_seed_repeats_an_answer_and_another_seed_or_none_gives_others(server: Any):
    def say(**sampling: Any) -> str:
        asked = {"model": "auto", "prompt": "The moon is", "max_tokens": 24, "temperature": 1.5}
        return server.openai.completions.create(**{**asked, **sampling}).choices[0].text

    assert say(seed=5) == say(seed=5)
    assert say(seed=-5) == say(seed=-5)
    assert len({say(seed=5), say(seed=6), say(), say()}) == 4
    assert say(top_p=1e-6) == say(temperature=0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_an_answer_a_stream_and_a_refusal(server: Any):
    def curl(body: str, *options: str) -> str:
        command = ["curl", "-sS", "-N", f"{server.url}/v1/completions", "-d", body, *options]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    json_header = ("-H", "Content-Type: application/json")
    asked = {"prompt": "The moon is", "max_tokens": 3, "temperature": 0, "slo": {"total_ms": 60_000}}
    whole = json.loads(curl(json.dumps(asked), *json_header))
    assert whole["usage"]["completion_tokens"] == 3
    lines = curl(json.dumps({**asked, "stream": True}), *json_header).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(each["choices"][0]["text"] for each in events) == whole["choices"][0]["text"]
    refused = json.loads(curl("moon=1", "-w", "%{http_code}").removesuffix("415"))
    assert "Content-Type: application/json" in refused["error"]["message"]


def test_what_was_done_is_told_to_prometheus(server: Any):
    before = server.figure("amoeba_answers_total", shape=SHAPE, end="length")
    switches = server.figure("amoeba_shape_switches_total")
    kept = server.figure("amoeba_targets_total", kept="yes")
    for shape in (SHAPE, "4x1", SHAPE):
        server.openai.completions.create(
            model=shape, prompt="The", max_tokens=2, logprobs=0, extra_body={"slo": {"total_ms": 50_000}}, temperature=0
        )
    server.until(lambda: server.figure("amoeba_queue_requests") == 0)
    assert server.figure("amoeba_answers_total", shape=SHAPE, end="length") == before + 2
    assert server.figure("amoeba_shape_switches_total") >= switches + 2
    assert server.figure("amoeba_targets_total", kept="yes") == kept + 3
    assert 0 < server.figure("amoeba_attainment_ratio") <= 1
    assert server.figure("amoeba_queue_seconds") == 0
    assert server.figure("amoeba_ttft_seconds_count", shape=SHAPE) >= 2
    assert server.http.get("/health").json() == {"status": "ok", "model": "elastic"}


def test_what_is_left_out_is_told_and_the_answer_is_that_of_what_stays(
    strict: Any, live: ElasticModel, known: Any, alone: Any
):
    asked = {"model": "auto", "logprobs": True, **GREEDY}
    said = strict.openai.chat.completions.create(messages=CHAT, **asked)
    got, prompt = said.amoeba["prompt"], rendered(known, CHAT)
    kept = [position for start, end in got["positions"] for position in range(start, end)]
    assert len(kept) == got["kept"] < got["tokens"] == len(prompt)
    assert got["share"] == pytest.approx(got["kept"] / got["tokens"], abs=1e-4)
    assert known.decode([prompt[position] for position in kept]).endswith("What is it?<end><turn>assistant")
    gone = "".join(CHAT[message]["content"][start:end] for message, start, end in got["dropped"])
    assert gone == known.decode([token for position, token in enumerate(prompt) if position not in kept])
    assert len(said.choices[0].logprobs.content) > 0
    expected = alone(live.model, [prompt[position] for position in kept], 12)
    told = [each.logprob for each in said.choices[0].logprobs.content]
    assert told == pytest.approx([value for _, value in expected][: len(told)], abs=1e-4)
    assert strict.figure("amoeba_tokens_total", of="kept") < strict.figure("amoeba_tokens_total", of="prompt")
    text = strict.openai.completions.create(
        model="auto", prompt="Red is", extra_body={"context": "So it is. "}, **GREEDY
    )
    assert {number for number, _, _ in text.amoeba["prompt"]["dropped"]} == {0}
    assert text.amoeba["prompt"]["kept"] < text.amoeba["prompt"]["tokens"]
