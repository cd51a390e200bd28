"""What judges shapes: an evaluator makes a judge of an elastic model, and the judge gives a shape a value with its
interval.

Shapes are judged by running the elastic model at them, nothing is copied or cut out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.multiple_choice import load_questions
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, Objective, PerTokenLoss
from amoeba_plugin.shape import SubnetShape

SEED, ROWS_AT_ONCE = 0, 8


class Judge(ABC):
    """Tells how good shapes of one elastic model are. Subclass it, and hand over what makes it by the hook
    ``amoeba_evaluators``.

    Attributes:
        unit: Of its values, for people.
        larger_is_better: Whether a larger value is a better shape.
    """

    unit: str
    larger_is_better: bool = False

    @abstractmethod
    def judge(self, shape: SubnetShape) -> Quality:
        """Return a shape's value; its samples, if it has some, are of the same units for every shape, in one order."""


Evaluator = Callable[[ElasticModel, PreTrainedTokenizerBase, Asked], Judge]


class ObjectiveJudge(Judge):
    """Judges by an objective on batches.

    Args:
        elastic: The model.
        objective: What is measured.
        batches: On what.
    """

    def __init__(self, elastic: ElasticModel, objective: Objective, batches: Sequence[Batch]) -> None:
        objective.check(batches)
        self.elastic, self.objective, self.batches = elastic, objective, batches
        self.unit, self.larger_is_better = objective.unit, objective.larger_is_better

    def judge(self, shape: SubnetShape) -> Quality:
        """Run the elastic model at the shape."""
        return self.quality(self.observed(shape, self.batches))

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


class AccuracyJudge(ObjectiveJudge):
    """Share of questions answered right; its units are questions."""

    def quality(self, observed: Tensor) -> Quality:
        """Return the share; what is right, the objective says of each question."""
        questions = observed[:, 2]
        return Quality.share([
            self.objective.score(observed[questions == number]).value > 0 for number in questions.unique(sorted=True)
        ])  # fmt: skip


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
