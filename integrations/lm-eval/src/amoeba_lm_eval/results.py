"""What was scored: every document of every task at every shape, and what follows from that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from amoeba_lm_eval.bootstrap import (
    Array,
    aggregated,
    difference,
    groups_that_cannot_be_ranked,
    interval,
    resampled,
)
from amoeba_plugin.runtime.documents import Document, Part


class Metric(Part):
    """One metric of every document.

    Attributes:
        aggregation: How documents become one number, a key of ``bootstrap.AGGREGATIONS``.
        higher_is_better: Its direction.
        values: Of each document: a score, or a log-likelihood in nats.
        weights: What they are divided by, words or bytes; ``None``: one for each document.
    """

    aggregation: str
    higher_is_better: bool
    values: list[float]
    weights: list[float] | None = None


class Score(Part):
    """A task at a shape.

    Attributes:
        shape: Of the model.
        task: Its name.
        metrics: By name.
        left_out: Metrics that are no ratio of sums over documents.
        cut: Requests that were longer than the model sees, whose beginning it did not see.
    """

    shape: str
    task: str
    metrics: dict[str, Metric]
    left_out: list[str] = Field(default_factory=list)
    cut: int = 0


class Estimate(Part):
    """A metric of a task at a shape, with its interval of 95 %, and how far it is from the first shape's."""

    task: str
    metric: str
    shape: str
    value: float
    interval: tuple[float, float] | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None


class Unranked(Part):
    """Shapes of which no two differ for sure: the interval of every paired difference holds 0."""

    task: str
    metric: str
    documents: int
    shapes: list[str]


class About(Part):
    """What was scored and how: what makes results comparable.

    Attributes:
        model: As it was named.
        kind: What it is.
        digest: Of its files.
        limit: Documents of each task.
        num_fewshot: Answered documents in front of each.
        seed: Of few-shot examples and intervals.
        max_length: Tokens that the model sees, as asked for.
        lm_eval: Version of the harness.
    """

    model: str
    kind: str
    digest: str
    limit: int | None
    num_fewshot: int | None
    seed: int
    max_length: int | None
    lm_eval: str

    def differs_from(self, other: About) -> str:
        """Return in words what is different; names may be, the files count."""
        mine, its = self.model_dump(exclude={"model"}), other.model_dump(exclude={"model"})
        names = {"digest": "files of the model", "kind": "model", "lm_eval": "version of lm_eval"}
        return ", ".join(
            f"{names.get(name, name)} ({its[name]}, now {mine[name]})" if name != "digest" else names[name]
            for name in mine
            if mine[name] != its[name]
        )


class Results(Document):
    """All scores of a model.

    Attributes:
        version: Of the document.
        about: What was scored, and how.
        shapes: In their order; the first is what others are compared with.
        tasks: Digests of what is asked, by name.
        scores: In the order of shapes and tasks.
        estimates: Of every metric.
        unranked: What the documents cannot tell apart.
    """

    what: ClassVar[str] = "a file of `amoeba evaluate`"
    version: Literal[1] = 1
    about: About
    shapes: list[str]
    tasks: dict[str, str]
    scores: list[Score] = Field(default_factory=list)
    estimates: list[Estimate] = Field(default_factory=list)
    unranked: list[Unranked] = Field(default_factory=list)

    def missing(self) -> list[tuple[str, str]]:
        """Return shapes and tasks that were not scored yet."""
        done = {(score.shape, score.task) for score in self.scores}
        return [(shape, task) for shape in self.shapes for task in self.tasks if (shape, task) not in done]

    def of_task(self, task: str) -> list[Score]:
        """Return the scores of a task, in the order of shapes."""
        return sorted(
            (each for each in self.scores if each.task == task), key=lambda each: self.shapes.index(each.shape)
        )

    def concluded(self) -> Results:
        """Return it with what follows from the scores."""
        tasks = list(self.tasks)
        scores = sorted(self.scores, key=lambda each: (self.shapes.index(each.shape), tasks.index(each.task)))
        estimates, unranked = [], []
        for task in tasks:
            of = self.of_task(task)
            for name in of[0].metrics if of else ():
                found, groups = _concluded(name, of, self.about.seed)
                estimates += found
                unranked += groups
        return self.model_copy(update={"scores": scores, "estimates": estimates, "unranked": unranked})


def _concluded(name: str, scores: list[Score], seed: int) -> tuple[list[Estimate], list[Unranked]]:
    """Return what one metric of a task says of shapes."""
    metrics, shapes, task = [score.metrics[name] for score in scores], [score.shape for score in scores], scores[0].task
    values, weights, how = *_arrays(metrics), metrics[0].aggregation
    found, documents = aggregated(values, weights, how), values.shape[-1]
    if documents < 2:  # nothing to resample
        return [
            Estimate(task=task, metric=name, shape=shape, value=value)
            for shape, value in zip(shapes, found.tolist(), strict=True)
        ], []
    samples = resampled(values, weights, how, seed)
    apart = [difference(each, samples[0]) for each in samples]
    estimates = [
        Estimate(
            task=task, metric=name, shape=shape, value=float(found[row]), interval=interval(samples[row]),
            difference=float(difference(found[row], found[0])) if row else None,
            difference_interval=interval(apart[row]) if row else None,
        )
        for row, shape in enumerate(shapes)
    ]  # fmt: skip
    groups = [
        Unranked(task=task, metric=name, documents=documents, shapes=[shapes[row] for row in group])
        for group in groups_that_cannot_be_ranked(samples)
    ]
    return estimates, groups


def _arrays(metrics: list[Metric]) -> Iterator[Array]:
    values = np.array([metric.values for metric in metrics], dtype=np.float64)
    yield values
    yield np.array([metric.weights or [1.0] * values.shape[-1] for metric in metrics], dtype=np.float64)
