"""Deployed files side by side, each in its engine's process, against transformers on what each directory holds."""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_plugin.deployment.deployed import KEY, Opening
from amoeba_plugin.deployment.engines.process import EngineCommand
from amoeba_plugin.deployment.torch_flow import Torch
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError, DeploymentError, ShapeError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.extraction.parity import PARITY_NAME
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.feasible import Decision
from amoeba_plugin.serving.files import FilesBackend, logits_of, require_followed
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.testing.flows import CONFIG, VOCABULARY
from amoeba_plugin.testing.random_models import random_model, random_strategy

SHAPES = ("4x1", "3x1/2")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories as `amoeba deploy` writes them, without its proofs."""
    model = random_model(CONFIG)
    live, found = ElasticModel(model, random_strategy(model)), {}
    for number, shape in enumerate(SHAPES):
        found[shape] = tmp_path_factory.mktemp(f"file{number}")
        extract(live, shape).save_pretrained(found[shape])
        opening = Opening(entry=".", shape=shape).model_dump()
        (found[shape] / PARITY_NAME).write_text(json.dumps({"point": "torch:fp32", KEY: opening}))
    return found


def test_answers_in_turns_are_those_of_every_file_alone(deployed: dict[str, Path]):
    order: Iterator[str] = itertools.cycle(SHAPES)
    prompts = [[5 + number, 9, 31, 2, 77][: 2 + number % 4] for number in range(6)]
    with FilesBackend(list(deployed.values()), VOCABULARY, context=32) as backend:
        assert [str(shape) for shape in backend.space] == list(SHAPES)
        assert (str(backend.space.largest), str(backend.space.smallest), len(backend.space)) == ("4x1", "3x1/2", 2)
        assert SubnetShape.parse("4x1/2") not in backend.space
        with pytest.raises(ShapeError, match="no file of shape 4x1/2: there are 4x1, 3x1/2; take one of them"):
            backend.space.require("4x1/2")
        with ElasticService(
            backend, lambda *_: Latency(1e-3, 1e-3), lambda *_: Decision(SubnetShape.parse(next(order)))
        ) as service:
            answers = [service.ask(Request(prompt, most=6)) for prompt in prompts]
            pieces = [list(answer) for answer in answers]
    for answer, prompt, found in zip(answers, prompts, pieces, strict=True):
        model = AutoModelForCausalLM.from_pretrained(deployed[str(answer.decision.shape)])
        tokens = [*prompt, *(piece.token for piece in found)]
        with torch.no_grad():
            rows = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert [piece.token for piece in found] == rows.argmax(-1).tolist()
        assert [piece.log_probability for piece in found] == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)


def test_an_engine_forgets_a_request_that_nobody_holds(deployed: dict[str, Path]):
    shape = SubnetShape.parse("3x1/2")
    with FilesBackend([deployed["3x1/2"]], VOCABULARY, context=32) as backend:
        first, logits = backend.prefill(shape, [5, 9])
        number = first.number
        again, _ = backend.prefill(shape, [7])
        del first
        gc.collect()
        backend.step(shape, again, 3)
        anew = backend._engines[shape].ask("follow", request=number, tokens=[5, 9], most=3).value
    assert anew[0] == logits.topk(3).indices.tolist()  # as a request that is new


def test_an_engine_that_ends_fails_what_it_computed_and_nothing_that_comes(deployed: dict[str, Path]):
    shape, other = SubnetShape.parse("3x1/2"), SubnetShape.parse("4x1")
    with FilesBackend(list(deployed.values()), VOCABULARY, context=32) as backend:
        before, expected = backend.prefill(shape, [5, 9])
        beside, _ = backend.prefill(other, [5, 9])
        backend._engines[shape]._process.kill()
        with pytest.raises(DeploymentError, match="the process of torch ended by SIGKILL"):
            backend.step(shape, before, 3)
        with pytest.raises(DeploymentError, match="and with it what was computed of the request"):
            backend.step(shape, before, 3)  # never as if 3 were all of its prompt
        _, again = backend.prefill(shape, [5, 9])
        assert torch.equal(again, expected)
        backend.step(other, beside, 3)
        assert backend.switches == 3


def test_an_engine_that_cannot_follow_requests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    require_followed("torch:fp32")
    (tmp_path / "engine.py").write_text("class Engine:\n    pass\n")
    monkeypatch.setattr(Torch, "command", lambda flow: EngineCommand(tmp_path / "engine.py"))
    with pytest.raises(DeploymentError, match=r"torch:fp32 cannot be served: .* for torch or llama-cpp, which have it"):
        require_followed("torch:fp32")


def test_the_rest_of_a_vocabulary_shares_what_is_left():
    known = torch.randn(50).mul(3).log_softmax(-1)
    top = known.topk(10)
    found = logits_of(top.indices.tolist(), top.values.tolist(), 50)
    torch.testing.assert_close(found[top.indices], top.values)
    rest = found[~torch.isin(torch.arange(50), top.indices)]
    assert rest.tolist() == pytest.approx([math.log((1 - float(top.values.exp().sum())) / 40)] * 40, abs=1e-4)
    assert torch.equal(logits_of(list(range(50)), known.tolist(), 50), known)


def test_directories_that_do_not_go_together_are_refused(deployed: dict[str, Path], tmp_path: Path):
    with pytest.raises(ArtifactError, match="is nothing that `amoeba deploy` wrote"):
        FilesBackend([tmp_path], VOCABULARY, 32)
    with pytest.raises(ArtifactError, match="these are of none"):
        FilesBackend([], VOCABULARY, 32)
    with pytest.raises(ArtifactError, match="name each shape once"):
        FilesBackend([deployed["4x1"], deployed["4x1"]], VOCABULARY, 32)
