"""Makes the compact model of an elastic checkpoint from a user's own questions: labels by the model itself."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.multiple_choice import QuestionColumns, read_questions
from amoeba_plugin.data.prompted import PromptedQuestion, prompted
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import read_record
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import ArtifactError, DataError, did_you_mean
from amoeba_plugin.runtime.files import is_vacant, require_writable, whole_or_nothing
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.serving.compact.encoder import load_encoder
from amoeba_plugin.serving.compact.features import Features, PromptFeatures
from amoeba_plugin.serving.compact.files import Tuned, save_compact
from amoeba_plugin.serving.compact.heads import Choices, ScoreHead, marked
from amoeba_plugin.serving.compact.labels import SCORE_LABELS, rightness
from amoeba_plugin.serving.compact.reader import CompactModel
from amoeba_plugin.serving.compact.training import Read, trained_decisions, trained_scores
from amoeba_plugin.shape import ShapeSpace, SubnetShape

logger = logging.getLogger(__name__)
SHARES = (Fraction(1), Fraction(7, 10), Fraction(2, 5), Fraction(1, 10))
FEWEST = 10  # questions
MOST = 9  # shapes that are tried, where none are named


@dataclass(frozen=True)
class Asked:
    """What the heads are to learn from.

    Attributes:
        dataset: Multiple-choice questions, those of training.
        split: Of the data set.
        num_questions: At most.
        shots: Of the questions, how many stand answered before each of the others; they can be left out.
        letters: Whether questions list their choices by letter and ask for the letter.
        max_seq_length: Tokens of a prompt with a choice, at most.
        labels: Of scores, by name.
        shapes: That are tried, and decided among; none: of a large space nine.
        shares: Of the droppable tokens that are tried.
        seed: Of the draw, weights and order.
        columns: Of the data set.
        encoder: That reads prompts, by id or path; empty: the elastic model's first layers do.
    """

    dataset: str
    split: str = "train"
    num_questions: int = 200
    shots: int = 0
    letters: bool = False
    max_seq_length: int = 1024
    labels: str = "self_information"
    shapes: tuple[SubnetShape, ...] = ()
    shares: tuple[Fraction, ...] = SHARES
    seed: int = 0
    columns: QuestionColumns = field(default_factory=QuestionColumns)
    encoder: str = ""


def tune_decisions(elastic: Path, output: Path, asked: Asked, base: str | None = None) -> Tuned:
    """Train the compact model of an elastic checkpoint and write it to a new directory.

    Raises:
        ArtifactError: If the directory is full, or the encoder cannot be loaded.
        DataError: If the questions are too few, or cannot be read.
    """
    if asked.labels not in SCORE_LABELS:
        raise DataError(
            f"there are no labels '{asked.labels}' of scores.{did_you_mean(asked.labels, SCORE_LABELS)} There are "
            f"{', '.join(SCORE_LABELS)}"
        )
    if not is_vacant(output):
        raise ArtifactError(f"{output} is not empty; name a new directory")
    require_writable(output, whole=True)
    for shape in asked.shapes:
        SubnetStrategy.load(elastic).space.require(shape)
    tokenizer = load_tokenizer(base or read_record(elastic).base_of(elastic))
    questions = drawn(asked, tokenizer)  # words before weights
    encoder = load_encoder(asked.encoder, tokenizer) if asked.encoder else None
    live, _ = load_elastic(elastic, base)
    model, tuned = tuned_on(live, questions, asked, encoder)
    with whole_or_nothing(output) as partial:
        save_compact(model, live.strategy.fingerprint, tuned, partial)
    return tuned


def drawn(asked: Asked, tokenizer: PreTrainedTokenizerBase) -> list[PromptedQuestion]:
    """Return questions behind their examples.

    Raises:
        DataError: If they are too few, or one is too long.
    """
    found = read_questions(asked.dataset, asked.split, asked.columns)
    random.Random(asked.seed).shuffle(found)
    examples, others = found[: asked.shots], found[asked.shots : asked.shots + asked.num_questions]
    if len(others) < FEWEST:
        raise DataError(
            f"data set {asked.dataset} has {len(others)} questions besides {asked.shots} examples; {FEWEST} are the "
            "fewest to learn from"
        )
    return [prompted(each, examples, tokenizer, asked.letters, asked.max_seq_length) for each in others]


def tuned_on(
    live: ElasticModel, questions: Sequence[PromptedQuestion], asked: Asked, encoder: PromptFeatures | None = None
) -> tuple[CompactModel, Tuned]:
    """Return the compact model that questions make, and how it was made.

    Args:
        live: The elastic model.
        questions: With their prompts.
        asked: How it is made.
        encoder: That reads prompts; ``None``: the elastic model's first layers do.
    """
    before, features = time.process_time(), encoder or Features(live)
    shares = asked.shares if any(len(each.droppable) for each in questions) else asked.shares[:1]
    choices = Choices(asked.shapes or spread(live.space), shares)
    reads = [Read(features(each.prompt), marked(each.droppable, len(each.prompt))) for each in questions]
    label = SCORE_LABELS[asked.labels]
    with StageBar(total=len(questions), desc="labels of tokens", unit="prompt", shorter="--num-questions") as bar:
        labels = []
        for question in questions:
            labels.append(label(live, question))
            bar.update()
    scores, explained = trained_scores(reads, labels, asked.seed) if len(choices.shares) > 1 else _no_scores(features)
    with torch.no_grad():
        given = [scores(read.features).tolist() for read in reads]
    trials = len(questions) * len(choices.shapes) * len(choices.shares)
    with StageBar(total=trials, desc="labels of decisions", unit="answer", shorter="--num-questions") as bar:
        right = rightness(live, questions, given, choices, bar.update)
    decisions, nats = trained_decisions(reads, right, choices, asked.seed)
    tuned = Tuned(
        questions=len(questions), labels=asked.labels, explained=explained, nats=nats,
        cpu_seconds=time.process_time() - before, right=right.float().mean(0).tolist(),
    )  # fmt: skip
    return CompactModel(features, scores, decisions, choices), tuned


def spread(space: ShapeSpace, most: int = MOST) -> tuple[SubnetShape, ...]:
    """Return shapes of a space, larger ones first: all, or as many as may be, from end to end of depths and widths.

    >>> space = ShapeSpace(tuple(range(12, 5, -1)), (Fraction(1), Fraction(3, 4), Fraction(1, 2)))
    >>> [str(shape) for shape in spread(space, 4)]
    ['12x1', '12x1/2', '6x1', '6x1/2']
    """
    if len(space) <= most:
        return tuple(space)
    side = math.isqrt(most)
    depths, widths = _ends(space.depths, side), _ends(space.widths, side)
    return tuple(SubnetShape(depth, width) for depth in depths for width in widths)


def _ends(values: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of a sequence, evenly, with both ends."""
    last, count = len(values) - 1, min(most, len(values))
    return [values[round(last * index / max(count - 1, 1))] for index in range(count)]


def _no_scores(features: PromptFeatures) -> tuple[ScoreHead, float]:
    logger.info("the questions have neither context nor examples: nothing of a prompt will be left out")
    return ScoreHead(features.size), 0.0
