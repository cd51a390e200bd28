"""Deployed files behind the server: what their engine alone says, and all that is promised of an elastic model."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from amoeba_http_service import resident_files
from amoeba_http_service.resident import How
from amoeba_http_service.resident_files import profile_of_files

from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.deployed import running
from amoeba_plugin.deployment.deployed_shapes import DeployedShapes
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.serving.feasible import profiled
from amoeba_plugin.shape import SubnetShape

CHAT = [{"role": "user", "content": "What is it?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
LONG = {"model": "4x1", "prompt": "The moon is", "max_tokens": 400, "temperature": 0, "logprobs": 0}


def alone(directory: Path, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """Return the greedy tokens of a directory's engine, with their log-probabilities."""
    found: list[tuple[int, float]] = []
    with running(directory, 64, requests=1) as engine:
        tokens = prompt
        for _ in range(count):
            ids, told = engine.ask("follow", request=0, tokens=tokens, most=1).value
            found.append((ids[0], told[0]))
            tokens = ids[:1]
    return found


def greedy(server: Any, known: Any, directory: Path, shape: str) -> None:
    """Require a chat at a shape to be what its engine alone says."""
    said = server.openai.chat.completions.create(model=shape, messages=CHAT, logprobs=True, **GREEDY)
    text = known.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = alone(directory, known(text, add_special_tokens=False)["input_ids"], 8)
    expected = expected[: next((at for at, (token, _) in enumerate(expected) if token == known.eos_token_id), 8)]
    told = said.choices[0].logprobs.content
    assert [each.token for each in told] == [known.decode([token]) for token, _ in expected]
    assert [each.logprob for each in told] == pytest.approx([value for _, value in expected], abs=1e-4)
    assert said.amoeba["shape"] == shape
    assert said.amoeba["measured"]["ttft_ms"] > 0


def test_greedy_answers_are_those_of_every_files_own_engine(files: Any, deployed: list[Path], known: Any):
    for directory, shape in zip(deployed, ("4x1", "3x1/2"), strict=True):
        greedy(files, known, directory, shape)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's bindings are not installed")
def test_files_of_llama_cpp_answer_as_llama_cpp_alone(start: Any, elastic: Path, known: Any, tmp_path: Path):
    deploy_shape(elastic, "4x1", "llama-cpp:Q8_0", tmp_path / "out")
    with start(models=[tmp_path / "out"]) as server:
        assert [each.id for each in server.openai.models.list()] == ["auto", "4x1"]
        greedy(server, known, tmp_path / "out", "4x1")
        ask = server.openai.completions.create
        whole = ask(model="auto", prompt=[5] * 508, max_tokens=4, temperature=0)
        assert whole.usage.total_tokens <= 512  # its engine has room for all that the service lets in


def test_the_shapes_are_the_files_and_targets_choose_among_them(files: Any):
    listed = {each.id: each.amoeba for each in files.openai.models.list()}
    assert list(listed) == ["auto", "4x1", "3x1/2"]
    assert {(each["of"], each["context"], each["chat"]) for each in listed.values()} == {("torch:fp32", 512, True)}
    ask = files.openai.chat.completions.create
    assert ask(model="auto", messages=CHAT, **GREEDY).amoeba["shape"] == "4x1"
    tight = ask(model="auto", messages=CHAT, extra_body={"slo": {"tpot": 0.7}}, **GREEDY).amoeba
    assert (tight["shape"], tight["in_time"]) == ("3x1/2", True)
    with pytest.raises(openai.UnprocessableEntityError, match="no shape keeps tpot 0.001 ms: the nearest"):
        ask(model="auto", messages=CHAT, extra_body={"slo": {"tpot_ms": 0.001}}, **GREEDY)
    with pytest.raises(openai.NotFoundError, match="no model named '4x3/4'"):
        ask(model="4x3/4", messages=CHAT, **GREEDY)


def test_streams_cancellation_and_figures_are_as_of_an_elastic_model(files: Any):
    whole = files.openai.completions.create(**{**LONG, "max_tokens": 8})
    chunks = list(files.openai.completions.create(stream=True, **{**LONG, "max_tokens": 8}))
    assert "".join(each.choices[0].text for each in chunks) == whole.choices[0].text
    assert chunks[-1].amoeba["measured"]["tpot_ms"] > 0
    cancelled = files.figure("amoeba_answers_total", shape="4x1", end="cancelled")
    switches = files.figure("amoeba_shape_switches_total")
    stream = files.openai.completions.create(stream=True, **LONG)
    next(iter(stream))
    files.openai.completions.create(
        **{**LONG, "model": "3x1/2", "max_tokens": 2}, extra_body={"slo": {"total_ms": 60_000}}
    )
    stream.close()
    files.until(lambda: files.figure("amoeba_answers_total", shape="4x1", end="cancelled") == cancelled + 1)
    assert files.figure("amoeba_queue_requests") == 0
    assert files.figure("amoeba_shape_switches_total") >= switches + 1
    assert files.figure("amoeba_ttft_seconds_count", shape="3x1/2") >= 1


def test_an_interrupt_at_a_terminal_finishes_what_runs_and_leaves_no_engine(start: Any, deployed: list[Path]):
    with start(models=deployed) as server:
        stream = server.openai.completions.create(stream=True, **{**LONG, "max_tokens": 100})
        engines = children(server.process.pid)
        assert len(engines) >= 1
        told: list[Any] = []
        reader = threading.Thread(target=lambda: told.extend(stream))
        next(iter(stream))
        reader.start()
        os.killpg(server.process.pid, signal.SIGINT)
        reader.join(120)
        assert server.process.wait(60) == 0
        assert told[-1].choices[0].finish_reason in ("length", "stop")
        assert "ended; what ran was finished" in "".join(server.said)
        assert not any(Path(f"/proc/{each}").exists() for each in engines)


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_an_engine_that_dies_costs_the_request_that_it_computed_and_no_other(start: Any, deployed: list[Path]):
    with start(models=deployed[1:]) as server:
        asked = {**LONG, "model": "3x1/2", "max_tokens": 4}
        before = server.openai.completions.create(**asked).choices[0].text
        (engine,) = children(server.process.pid)
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
            server.openai.completions.create(**asked)
        assert server.openai.completions.create(**asked).choices[0].text == before


@pytest.mark.parametrize("which", ["server", "files"])
@pytest.mark.parametrize(("prompt", "most", "allowed"), [(500, 12, True), (500, 13, False), (512, None, False)])
def test_what_is_longer_than_the_context_is_refused_at_once(
    which: str, prompt: int, most: int | None, allowed: bool, request: pytest.FixtureRequest
):
    server = request.getfixturevalue(which)
    body = {"model": "3x1/2", "prompt": [5] * prompt, "temperature": 0, "max_tokens": most}
    response = server.http.post("/v1/completions", json={key: each for key, each in body.items() if each is not None})
    if allowed:
        assert response.json()["usage"]["prompt_tokens"] == prompt
        return
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert "and the model has 512 positions; shorten the prompt, or ask for fewer tokens" in error["message"]


def test_a_context_of_ones_own_is_kept_to(start: Any, deployed: list[Path]):
    with start("--context", "64", models=deployed[1:]) as server:
        assert {each.amoeba["context"] for each in server.openai.models.list()} == {64}
        ask = server.openai.completions.create
        assert ask(model="auto", prompt=[5] * 60, max_tokens=4, temperature=0).usage.prompt_tokens == 60
        with pytest.raises(openai.UnprocessableEntityError, match="the model has 64 positions"):
            ask(model="auto", prompt=[5] * 60, max_tokens=5)


def test_where_there_is_no_profile_the_files_are_measured_once(
    deployed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resident_files, "ROUNDS", 1)
    files, how = DeployedShapes.of(deployed), How(tmp_path / "profile.json")
    made = profile_of_files(files, how, 64, progress=False)
    assert made.flows["torch:fp32"].threads == 1
    assert Profile.load(how.profile) == made
    predicted = profiled(made, "torch:fp32")
    for shape in map(SubnetShape.parse, ("4x1", "3x1/2")):
        for tokens in (1, 20, 60):
            assert predicted(shape, tokens).ttft > 0 < predicted(shape, tokens).tpot
    monkeypatch.setattr(resident_files, "profile_files", None)  # is not called again
    assert profile_of_files(files, how, 64) == made
    with pytest.raises(ArtifactError, match="was measured with 1 threads, and --threads asks for 2"):
        profile_of_files(files, How(how.profile, threads=2), 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--decisions", "compact"], "a compact model belongs to an elastic checkpoint, and deployed files are none"),
        (["--decider", "dual_head"], "leave out --decisions and dual_head"),
        (["--drafts"], "small shapes draft for larger ones where they share weights, and deployed files do not"),
        (["--base", "base"], "deployed files need no base model"),
        (["--context", "513"], "--context is 513 tokens, and the model has 512 positions; name fewer"),
        (["--decider", "fixed", "--shape", "4x1/2"], "there is no file of shape 4x1/2: there are 4x1, 3x1/2"),
        (["--threads", "2"], "was measured with 1 threads, and --threads asks for 2"),
    ],
)
def test_what_files_cannot_do_is_refused(
    amoeba: Any, deployed: list[Path], profile: Path, options: list[str], words: str
):
    done = amoeba(*deployed, "--port", 0, "--profile", profile, *options)
    assert done.exit_code == 2
    assert words in re.sub(r"\s+", " ", done.output)


def test_directories_that_do_not_go_together_are_refused(
    amoeba: Any, elastic: Path, deployed: list[Path], profile: Path
):
    for models, options, words in (
        ((elastic, *deployed), (), "an elastic checkpoint is served alone"),
        ((deployed[0], deployed[0]), (), "two of the directories hold the same shape"),
        ((elastic,), ("--context", 64), "--context is of deployed files"),
    ):
        done = amoeba(*models, "--port", 0, "--profile", profile, *options)
        assert done.exit_code == 2
        assert words in re.sub(r"\s+", " ", done.output)
