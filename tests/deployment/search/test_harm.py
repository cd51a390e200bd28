"""What a scheme does, by its engine, against the same computed here: the checkpoint in that dtype, token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.search import evaluators
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.evaluators import ObjectiveJudge, accuracy, loss
from amoeba_plugin.deployment.search.harm import harm_of
from amoeba_plugin.deployment.search.problem import Choice
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, PerTokenLoss
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.testing.flows import tokenizer
from support.elastic_files import write_elastic

SHAPE = SubnetShape.parse("3x1/2")
CHOICE = Choice(SHAPE, Point("torch", "bf16"))


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ElasticModel]:
    directory = tmp_path_factory.mktemp("harm")
    write_elastic(directory)
    live, _ = load_elastic(directory / "elastic")
    rows = [
        {"question": text[at : at + 20], "choices": [text[at + 20 : at + 24], "zq", "a b", ","], "answer": at % 4}
        for at, text in enumerate(shipped_texts().passages * 2)
    ]
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory, live


def judge_of(elastic: tuple[Path, ElasticModel], name: str) -> ObjectiveJudge:
    directory, live = elastic
    file = directory / ("text.txt" if name == "loss" else "questions.jsonl")
    asked = Asked("exhaustive", str(file), num_samples=6, max_seq_length=40, letters=False)
    judge = {"loss": loss, "accuracy": accuracy}[name](live, tokenizer(), asked)
    assert isinstance(judge, ObjectiveJudge)
    return judge


@pytest.mark.parametrize("name", ["loss", "accuracy"])
def test_judged_as_the_engine_computes(elastic: tuple[Path, ElasticModel], name: str, tmp_path: Path):
    _, live = elastic
    judge = judge_of(elastic, name)
    harm = harm_of(live, judge)(CHOICE)
    extract(live, SHAPE).save_pretrained(tmp_path / "subnet")
    objective = PerTokenLoss() if name == "loss" else MultipleChoiceAccuracy()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "subnet", dtype=dtype)
        found[dtype] = objective.measure(rounded, judge.batches).value
    wanted = found[torch.bfloat16] - found[torch.float32]
    assert abs(wanted) > (1e-5 if name == "loss" else 0) or name == "accuracy"
    assert harm.value == pytest.approx(wanted, abs=2e-6 if name == "loss" else 1e-9)
    assert judge.judge(SHAPE).plus(harm).value == pytest.approx(found[torch.bfloat16], rel=1e-5)


def test_of_long_text_an_engine_is_asked_for_a_part(
    elastic: tuple[Path, ElasticModel], monkeypatch: pytest.MonkeyPatch
):
    judge = judge_of(elastic, "loss")
    every = [batch["labels"][:, 1:] for batch in judge.batches]
    total = sum(int((labels != -100).sum()) for labels in every)
    monkeypatch.setattr(evaluators, "POSITIONS", 50)
    few = [batch["labels"] for batch in judge.few()]
    kept = sum(int((labels != -100).sum()) for labels in few)
    assert 40 <= kept <= 50 < total
    assert all(bool((labels[:, 0] == -100).all()) for labels in few)
    rows = torch.cat([(labels != -100).sum(1) for labels in few])
    assert rows.min() >= 5, "of every row"
    for labels, whole in zip(few, every, strict=True):
        assert torch.equal(labels[:, 1:][labels[:, 1:] != -100], whole[labels[:, 1:] != -100])


def test_of_many_questions_an_engine_is_asked_whole_ones(
    elastic: tuple[Path, ElasticModel], monkeypatch: pytest.MonkeyPatch
):
    judge = judge_of(elastic, "accuracy")
    monkeypatch.setattr(evaluators, "POSITIONS", 20)
    few = judge.few()
    judge.objective.check(few)  # every question has its answer and the others
    assert 1 <= len({int(each) for batch in few for each in batch["question"]}) < 6
