"""What judges shapes: an evaluator makes a judge of an elastic model, and the judge gives a shape a value with its
interval.

Shapes are judged by running the elastic model at them, nothing is copied or cut out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.batch import IGNORED, Batch, target_counts
from amoeba_plugin.data.multiple_choice import load_questions
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, Objective, PerTokenLoss
from amoeba_plugin.shape import SubnetShape

SEED, ROWS_AT_ONCE = 0, 8
POSITIONS = 512  # tokens whose probabilities an engine is asked for, of text; of questions all that whole ones have


class Judge(ABC):
    """Tells how good shapes of one elastic model are. Subclass it, and hand over what makes it by the hook
    ``amoeba_evaluators``.

    Attributes:
        unit: Of its values, for people.
        larger_is_better: Whether a larger value is a better shape.
        asks_engines: Whether it can tell what a scheme does, of an engine's answers.
    """

    unit: str
    larger_is_better: bool = False
    asks_engines: bool = False

    @abstractmethod
    def judge(self, shape: SubnetShape) -> Quality:
        """Return a shape's value; its samples, if it has some, are of the same units for every shape, in one order."""

    def harm(self, shape: SubnetShape, nats: NatsInEngine) -> Quality:
        """Return what a scheme adds to a shape's value.

        Args:
            shape: That the engine runs, at its scheme.
            nats: Asks the engine for the nats of every row's labels.
        """
        raise NotImplementedError


NatsInEngine = Callable[[Batch], Sequence[float]]
Evaluator = Callable[[ElasticModel, PreTrainedTokenizerBase, Asked], Judge]


class ObjectiveJudge(Judge):
    """Judges by an objective on batches.

    Args:
        elastic: The model.
        objective: What is measured.
        batches: On what.
    """

    asks_engines = True

    def __init__(self, elastic: ElasticModel, objective: Objective, batches: Sequence[Batch]) -> None:
        objective.check(batches)
        self.elastic, self.objective, self.batches = elastic, objective, batches
        self.unit, self.larger_is_better = objective.unit, objective.larger_is_better

    def judge(self, shape: SubnetShape) -> Quality:
        """Run the elastic model at the shape."""
        return self.quality(self.observed(shape, self.batches))

    def harm(self, shape: SubnetShape, nats: NatsInEngine) -> Quality:
        """Compare the engine's answers with the elastic model's, unit by unit, on a part of the data."""
        few = self.few()
        plain = self.observed(shape, few)
        changed = plain.clone()
        changed[:, 0] = torch.tensor([each for batch in few for each in nats(batch)], dtype=torch.float64)
        (before,), (after,) = self.quality(plain).samples, self.quality(changed).samples
        return Quality.ratio([(one - other, weight) for (one, weight), (other, _) in zip(after, before, strict=True)])

    @abstractmethod
    def few(self) -> list[Batch]:
        """Return what an engine is asked about."""

    @torch.no_grad()
    def observed(self, shape: SubnetShape, batches: Sequence[Batch]) -> Tensor:
        """Return what the objective observes at a shape, (rows, columns) fp64; the first column is nats."""
        with self.elastic.active(shape) as model, evaluating(model):
            return torch.cat([self.objective.observe(model, batch) for batch in batches])

    @abstractmethod
    def quality(self, observed: Tensor) -> Quality:
        """Return the value of all rows, with its samples."""


class LossJudge(ObjectiveJudge):
    """Nats per token of held-out text; its units are rows."""

    def quality(self, observed: Tensor) -> Quality:
        """Return nats by tokens."""
        return Quality.ratio([(nats, tokens) for nats, tokens in observed.tolist()])

    def few(self) -> list[Batch]:
        """Return the text with every so many a label left, in all rows."""
        total = sum(int(target_counts(batch).sum()) for batch in self.batches)
        step, seen, few = math.ceil(total / POSITIONS), 0, []
        for batch in self.batches:
            labels = batch["labels"].clone()
            labels[:, 0] = IGNORED  # nothing predicts it
            targets = labels != IGNORED
            order = targets.flatten().cumsum(0).view_as(labels) + seen
            labels[order % step != 0] = IGNORED
            seen += int(targets.sum())
            few.append({**batch, "labels": labels})
        return few


class AccuracyJudge(ObjectiveJudge):
    """Share of questions answered right; its units are questions."""

    def quality(self, observed: Tensor) -> Quality:
        """Return the share; what is right, the objective says of each question."""
        questions = observed[:, 2]
        return Quality.share([
            self.objective.score(observed[questions == number]).value > 0 for number in questions.unique(sorted=True)
        ])  # fmt: skip

    def few(self) -> list[Batch]:
        """Return the first questions, whole."""
        rows = torch.cat([target_counts(batch) for batch in self.batches]).tolist()
        questions = torch.cat([batch["question"].flatten() for batch in self.batches]).tolist()
        total, kept = 0, set[int]()
        for number in dict.fromkeys(questions):
            total += sum(count for count, question in zip(rows, questions, strict=True) if question == number)
            if kept and total > POSITIONS:
                break
            kept.add(number)
        masks = [torch.tensor([int(each) in kept for each in batch["question"].flatten()]) for batch in self.batches]
        return [
            {name: column[mask] for name, column in batch.items()}
            for batch, mask in zip(self.batches, masks, strict=True)
            if mask.any()
        ]


def loss(elastic: ElasticModel, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> Judge:
    """Return what judges by held-out loss.

    Raises:
        DataError: If the text cannot be read.
    """
    batches = load_batches(
        asked.dataset, tokenizer, split=asked.split, num_samples=asked.num_samples,
        max_seq_length=asked.max_seq_length, batch_size=ROWS_AT_ONCE, vocab_size=elastic.config.vocab_size, seed=SEED,
    )  # fmt: skip
    return LossJudge(elastic, PerTokenLoss(), batches)


def accuracy(elastic: ElasticModel, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> Judge:
    """Return what judges by the share of multiple-choice questions answered right.

    Raises:
        DataError: If the questions cannot be read, or do not fit.
    """
    batches = load_questions(
        asked.dataset, tokenizer, split=asked.split, num_questions=asked.num_samples, letters=asked.letters,
        max_seq_length=asked.max_seq_length, batch_size=ROWS_AT_ONCE, vocab_size=elastic.config.vocab_size, seed=SEED,
    )  # fmt: skip
    return AccuracyJudge(elastic, MultipleChoiceAccuracy(), batches)
