"""Objectives: one number with a unit and a direction, measured on a model and materialised batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import IGNORED, Batch, model_inputs, target_counts
from amoeba_plugin.errors import DataError
from amoeba_plugin.models.adapter import text_model
from amoeba_plugin.runtime.module_calls import answering, evaluating, input_device

LOGITS_AT_ONCE = 2**25  # 128 MB in fp32: a whole batch of a 150k vocabulary would take gigabytes


@dataclass(frozen=True)
class Score:
    """What an objective measured: ``value`` in its own unit, and the ``loss`` in nats per token that breaks ties."""

    value: float
    loss: float


class Objective(ABC):
    """A number to make as large or as small as possible. Subclass it and hand it over by ``amoeba_objectives``.

    Attributes:
        name: The name it is registered under.
        unit: Unit of ``Score.value``, for reports.
        larger_is_better: Whether a larger ``Score.value`` is a better model.
    """

    name: str
    unit: str
    larger_is_better: bool

    @abstractmethod
    def check(self, batches: Sequence[Batch]) -> None:
        """Refuse batches that lack what :meth:`measure` needs, before anything expensive is done with them.

        Raises:
            DataError: Saying what is missing.
        """

    def observe(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return what one batch contributes, (rows, columns) fp64 on the CPU; the columns are the objective's own.

        The search over depths calls this once per subnet and batch, and gathers the rows of all ranks. An objective
        that overrides :meth:`measure` instead is searched with too, but every subnet then runs from its embeddings.
        """
        raise NotImplementedError(f"objective {self.name} has neither observe and score, nor measure")

    def score(self, observations: Tensor) -> Score:
        """Return the score of the observations of all batches, (rows, columns) fp64; their order does not matter."""
        raise NotImplementedError(f"objective {self.name} has neither observe and score, nor measure")

    @property
    def is_separable(self) -> bool:
        """Whether :meth:`measure` is :meth:`score` of what :meth:`observe` returns."""
        return type(self).measure is Objective.measure

    def measure(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Score:
        """Return the score of a model, which is not changed, on all batches together.

        Raises:
            DataError: If the batches lack what the objective needs.
        """
        self.check(batches)
        with evaluating(model):
            return self.score(torch.cat([self.observe(model, batch) for batch in batches]))


def better(objective: Objective, a: Score, b: Score) -> bool:
    """Tell whether ``a`` is strictly better than ``b``.

    Equal values are decided by the smaller loss; NaN and infinite ones are worst.

    >>> better(PerTokenLoss(), Score(2.0, 2.0), Score(float("nan"), float("nan")))
    True
    """
    return sort_key(objective, a) < sort_key(objective, b)


def sort_key(objective: Objective, score: Score) -> tuple[float, ...]:
    """Return what sorts scores from best to worst, NaN and infinite ones last.

    >>> sort_key(MultipleChoiceAccuracy(), Score(0.75, float("nan")))
    (-0.75, inf)
    """
    return tuple(each if math.isfinite(each) else math.inf for each in badness(objective, score))


def badness(objective: Objective, score: Score) -> tuple[float, float]:
    """Return a score as two numbers to make small: its value, negated where larger is better, then its loss."""
    return (-score.value if objective.larger_is_better else score.value, score.loss)


def target_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the cross-entropy of every target token of a batch.

    Logits are made and cast to fp32 for a few positions at a time, and for positions with a target only.

    Returns:
        (batch, positions - 1), fp32, nats; entry t belongs to label t + 1 and is 0 where that label is -100.
    """
    text = text_model(model)
    states, logits = _states(text, batch)
    targets = batch["labels"][:, 1:].to(states.device)
    predicted = targets != IGNORED
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    # loss_t = -log softmax(logits_t)[label_{t+1}], in fp32 whatever the model's dtype
    parts = [
        functional.cross_entropy(logits(few).float(), labels, reduction="none")
        for few, labels in zip(
            torch.split(states[:, :-1][predicted], at_once), torch.split(targets[predicted], at_once), strict=True
        )
    ]
    losses = torch.zeros(targets.shape, device=states.device)
    losses[predicted] = torch.cat(parts)
    return losses


def _states(model: Any, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return states (batch, positions, ·) and the function that maps some of them, (few, ·), to logits."""
    inputs = model_inputs(batch, input_device(model))
    if model._forward_pre_hooks or model._forward_hooks:  # a quantized model unpacks its weights in one
        return model(**inputs, use_cache=False).logits, lambda few: few
    decoder = model.get_decoder()
    output = decoder(**inputs, use_cache=False)
    token = torch.zeros((1, 1), dtype=torch.int64, device=input_device(model))

    def logits(few: Tensor) -> Tensor:
        # The class's own way from states to logits, which may cap and scale them; the decoder answers at once.
        answer = type(output)(**(dict(output) | {"last_hidden_state": few[None]}))
        with answering(decoder, lambda *args, **kwargs: answer):
            made: Tensor = model(token, use_cache=False).logits
        return made[0]

    return output.last_hidden_state, logits


class PerTokenLoss(Objective):
    """Mean cross-entropy of all target tokens of all batches together, in nats."""

    name = "loss"
    unit = "nats per token"
    larger_is_better = False

    def check(self, batches: Sequence[Batch]) -> None:
        """Require labels, and one target token at least, in all batches together."""
        if not batches:
            raise DataError(f"objective {self.name}: there are no batches; give a data set with text")
        missing = sorted({"labels"} - batches[0].keys())
        if missing:
            raise DataError(
                f"objective {self.name} needs the column {missing[0]}; the data has {', '.join(batches[0])}"
            )
        if not any(int(target_counts(batch).sum()) for batch in batches):
            raise DataError(
                f"objective {self.name}: no position of the {len(batches)} batches has a label to predict; "
                "give sequences of two tokens or more, with labels other than -100"
            )

    def observe(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return nats and target tokens of each row."""
        return torch.stack((_row_nats(model, batch), target_counts(batch).cpu().double()), dim=1)

    def score(self, observations: Tensor) -> Score:
        """Return the loss as value and as tie-breaker."""
        nats, tokens = observations.sum(dim=0).tolist()
        return Score(nats / tokens, nats / tokens)


class Perplexity(PerTokenLoss):
    """The exponential of the mean loss per token; ranks models as the loss does."""

    name = "perplexity"
    unit = "perplexity"

    def score(self, observations: Tensor) -> Score:
        """Return exp(loss), infinite where it overflows."""
        loss = super().score(observations).loss
        try:
            return Score(math.exp(loss), loss)
        except OverflowError:
            return Score(math.inf, loss)


class MultipleChoiceAccuracy(Objective):
    """Share of questions whose true continuation is likelier, per token, than every other choice.

    A row is one choice: context and continuation, ``labels`` on the continuation only. The columns ``question`` (an
    integer that the choices of a question share) and ``is_answer`` (0 or 1) are (batch,). Choices of one question may
    be in different batches.
    """

    name = "accuracy"
    unit = "share of questions answered right"
    larger_is_better = True

    def check(self, batches: Sequence[Batch]) -> None:
        """Require the two columns, one answer and another choice per question, and a target token in every row."""
        if not batches:
            raise DataError("objective accuracy: there are no batches; give a multiple-choice data set")
        for number, batch in enumerate(batches):
            missing = [column for column in ("labels", "question", "is_answer") if column not in batch]
            if missing:
                raise DataError(
                    f"objective accuracy needs the columns labels, question and is_answer; batch {number} lacks "
                    f"{', '.join(missing)} (it has {', '.join(batch)}). Give a multiple-choice data set, or take the "
                    "objective loss"
                )
            if not bool((target_counts(batch) > 0).all()):
                raise DataError(
                    f"objective accuracy: a choice in batch {number} has no label to predict; "
                    "labels must hold the continuation's tokens, and sequences must not be cut before it"
                )
        answers: dict[int, list[int]] = defaultdict(list)
        for question, is_answer in zip(_column(batches, "question"), _column(batches, "is_answer"), strict=True):
            answers[question].append(is_answer)
        for question, flags in answers.items():
            if len(flags) < 2 or sum(flag != 0 for flag in flags) != 1:
                raise DataError(
                    f"objective accuracy: question {question} has {len(flags)} choices of which "
                    f"{sum(map(bool, flags))} are answers; a question needs two choices or more, one of them the answer"
                )

    def observe(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return nats, target tokens, question and whether it is the answer, of each row."""
        columns = (target_counts(batch), batch["question"].flatten(), batch["is_answer"].flatten())
        return torch.stack((_row_nats(model, batch), *(column.cpu().double() for column in columns)), dim=1)

    def score(self, observations: Tensor) -> Score:
        """Return the share answered right, and the mean loss per token of the true choices."""
        answer: dict[float, float] = {}
        others: dict[float, list[float]] = defaultdict(list)
        answer_nats = answer_tokens = 0.0
        for nats, tokens, question, is_answer in observations.tolist():
            if is_answer:
                answer[question] = nats / tokens
                answer_nats, answer_tokens = answer_nats + nats, answer_tokens + tokens
            else:
                others[question].append(nats / tokens)
        # Strictly below every other choice: a tie, or NaN, is no answer, and the order of choices cannot matter.
        right = sum(all(answer[question] < other for other in others[question]) for question in answer)
        return Score(right / len(answer), answer_nats / answer_tokens)


def _row_nats(model: PreTrainedModel, batch: Batch) -> Tensor:
    return target_losses(model, batch).cpu().double().sum(dim=1)


def _column(batches: Sequence[Batch], name: str) -> list[int]:
    return [int(value) for batch in batches for value in batch[name].flatten().tolist()]
