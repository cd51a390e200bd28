"""A random elastic model, its files, and what is asked of it; no hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.checkpoint import save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import attach_random_smol, random_model, random_strategy

SHAPE = "3x1/2"
CHOICES = ["red", "a stone in the sea", "17"]
QUESTIONS = [
    {
        "query": f"Question: {each} is",
        "choices": ["red", "a stone in the sea", "17"][: 2 + number % 2],
        "gold": number % 2,
    }
    for number, each in enumerate(("Water", "The moon", "An old oak", "Copper", "Rain", "A horse", "Bread", "Glass"))
]


@dataclass(frozen=True)
class Files:
    """Directories and files that tests share; they only read them."""

    elastic: Path
    plain: Path  # without an adapter: a random one is so loud that engines' rounding shows
    subnet: Path
    questions: Path
    text: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("files")
    model = random_model(CONFIG)
    with torch.no_grad():  # random ones are too loud: predictions of one token alone tell little of the others
        model.get_output_embeddings().weight.mul_(0.2)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    live = ElasticModel(model, random_strategy(model))
    save_elastic(live, None, directory / "plain", str(directory / "base"))
    save_elastic(live, attach_random_smol(live), directory / "elastic", str(directory / "base"))
    extract_checkpoint(directory / "elastic", SHAPE, directory / "subnet")
    (directory / "questions.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in QUESTIONS))
    (directory / "text.jsonl").write_text(
        "".join(f"{json.dumps({'text': each})}\n" for each in shipped_texts().passages)
    )
    return Files(
        directory / "elastic",
        directory / "plain",
        directory / "subnet",
        directory / "questions.jsonl",
        directory / "text.jsonl",
    )


@pytest.fixture(scope="session")
def pairs() -> list[tuple[str, str]]:
    """Return contexts with continuations: of one token and of many, behind nothing, and behind a space."""
    found = [(f"{each['query']}\nAnswer:", f" {choice}") for each in QUESTIONS for choice in each["choices"]]
    return [*found, ("", "red as a horse"), ("The moon ", "is old"), *[("Rain is", letter) for letter in " abcde"]]
