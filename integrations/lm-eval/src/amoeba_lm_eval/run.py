"""Scoring: one shape and one task after another, written after each, so that it can be stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity
from lm_eval.api.model import CacheHook
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from tqdm.auto import tqdm

from amoeba_lm_eval.language_models import CountsCut
from amoeba_lm_eval.results import About, Metric, Results, Score
from amoeba_lm_eval.subjects import Subject
from amoeba_lm_eval.tasks import ask_as, load_tasks, quiet, requests_of
from amoeba_plugin.errors import AmoebaError, ArtifactError, DataError
from amoeba_plugin.runtime.files import require_writable
from amoeba_plugin.runtime.ownership import owning

WRITES = "generate_until"
NAMES: Mapping[Callable[..., Any], str] = {
    mean: "mean", perplexity: "perplexity", weighted_perplexity: "weighted_perplexity", bits_per_byte: "bits_per_byte",
}  # fmt: skip


@dataclass(frozen=True)
class How:
    """How a model is scored.

    Attributes:
        limit: Documents of each task, the first ones; ``None``: all.
        num_fewshot: Answered documents in front of each; ``None``: the task's own.
        seed: Of few-shot examples and intervals.
        max_length: Tokens that the model sees; ``None``: its own, up to a limit.
        batch_size: Rows at a time.
        threads: Of a deployed subnet's engine.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    seed: int = 0
    max_length: int | None = None
    batch_size: int = 4
    threads: int = 1

    def about(self, subject: Subject) -> About:
        """Return what makes results comparable: not how many rows or threads computed them."""
        return About(
            model=subject.name, kind=subject.kind, digest=subject.digest, limit=self.limit,
            num_fewshot=self.num_fewshot, seed=self.seed, max_length=self.max_length, lm_eval=version("lm_eval"),
        )  # fmt: skip


class _Progress(CacheHook):
    """Moves the bar on with every answer, of which lm_eval tells what keeps a cache."""

    def __init__(self, bar: Any) -> None:
        super().__init__(None)
        self._bar = bar

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count an answer."""
        self._bar.update()


def evaluate_subject(subject: Subject, names: Sequence[str], path: Path, how: How, progress: bool = True) -> Results:
    """Score a subject at its shapes on tasks, and write the results after each; those that are there are kept.

    Args:
        subject: What is scored.
        names: Of tasks, or files.
        path: Of the results.
        how: How it is scored.
        progress: Show a progress bar.

    Raises:
        ArtifactError: If the file has results of another model, other settings or other questions, or none.
        DataError: If a task or its data cannot be had, or cannot be asked of this subject.
        DeploymentError: If the engine of a deployed subnet fails.
    """
    require_writable(path.parent)
    model: list[CountsCut] = []  # text becomes tokens only once something is loaded
    tasks = load_tasks(names, lambda text: len(model[0].tok_encode(text, add_special_tokens=False)))
    digests, requests = {}, {}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == WRITES and not subject.writes:
            raise DataError(
                f"task {name} wants written answers, and a {subject.kind} is scored by its probabilities; take a task "
                "of choices or of perplexity, or score the subnet checkpoint"
            )
        ask_as(task, how.num_fewshot, how.seed)
        digests[name], requests[name] = requests_of(name, task, how.limit)
    with owning(path):
        results = _begun(path, how.about(subject), subject.shapes, digests)
        todo = [each for each in results.missing() if each[0] in subject.shapes and each[1] in tasks]
        total = sum(requests[task] for _, task in todo)
        with tqdm(total=total, desc="evaluate", unit="request", disable=not progress, leave=False) as bar:
            if todo:
                with subject.opened(how.max_length, how.batch_size, how.threads) as (lm, at):
                    model.append(lm)
                    lm.set_cache_hook(_Progress(bar))
                    for shape, name in todo:
                        bar.set_postfix_str(f"{shape} {name}")
                        with at(shape):
                            results.scores.append(_score(lm, shape, name, tasks[name], how))
                        results.save(path)
        results = results.concluded()
        results.save(path)
    return results


def _begun(path: Path, about: About, shapes: Sequence[str], tasks: Mapping[str, str]) -> Results:
    """Return the results that are there, with room for what is asked now."""
    if not path.exists():
        return Results(about=about, shapes=list(shapes), tasks=dict(tasks))
    known = Results.load(path)
    differs = about.differs_from(known.about)
    if differs:
        raise ArtifactError(f"{path} has results that cannot be compared, other: {differs}; name another file")
    others = [name for name, digest in tasks.items() if known.tasks.get(name, digest) != digest]
    if others:
        raise ArtifactError(f"{path} has results of other questions named {', '.join(others)}; name another file")
    return known.model_copy(update={"shapes": _merged(known.shapes, shapes), "tasks": {**known.tasks, **tasks}})


def _merged(known: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Return shapes in the order of their sizes, as spaces have it, where they are shapes."""
    from amoeba_plugin.shape import SubnetShape

    union = list(dict.fromkeys([*known, *asked]))
    return sorted(union, key=SubnetShape.parse, reverse=True) if len(union) > 1 else union


def _score(lm: CountsCut, shape: str, name: str, task: Task, how: How) -> Score:
    task.set_fewshot_seed(how.seed)  # the same examples at every shape
    lm.needs_likeliest = _needs_likeliest(task)
    before = lm.cut
    try:
        with quiet():
            found = evaluate(lm, {"tasks": {name: task}}, limit=how.limit, bootstrap_iters=0, log_samples=True)
    except (AmoebaError, OSError, MemoryError):
        raise
    except Exception as error:  # a task's own code raises anything
        raise DataError(f"task {name} cannot be scored ({type(error).__name__}: {error})") from error
    assert found is not None
    metrics, left_out = _metrics(task, found["samples"][name])
    if not metrics:
        raise DataError(
            f"task {name} has no metric that is a mean over documents or a perplexity, only {', '.join(left_out)}"
        )
    return Score(shape=shape, task=name, metrics=metrics, left_out=left_out, cut=lm.cut - before)


def _needs_likeliest(task: Task) -> bool:
    """Tell whether a score may depend on a continuation being the likeliest one; that of choices does seldom."""
    plain = task.OUTPUT_TYPE == "multiple_choice" and task.get_config("process_results") is None
    return not plain or "exact_match" in task.aggregation()


def _metrics(task: Task, samples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Metric], list[str]]:
    """Return every document's metrics, by name and filter, and the names of those that are no ratio of sums."""
    aggregation, better = task.aggregation(), task.higher_is_better()
    metrics: dict[str, Metric] = {}
    left_out = []
    for kind in dict.fromkeys(sample["filter"] for sample in samples):
        of = [sample for sample in samples if sample["filter"] == kind]
        for metric in of[0]["metrics"]:
            name, how = metric if kind == "none" else f"{metric},{kind}", NAMES.get(aggregation.get(metric))
            if how is None:
                left_out.append(name)
                continue
            pairs = [each[metric] if isinstance(each[metric], tuple) else (each[metric], 1.0) for each in of]
            weights = [float(weight) for _, weight in pairs]
            metrics[name] = Metric(
                aggregation=how, higher_is_better=bool(better.get(metric, True)),
                values=[float(value) for value, _ in pairs], weights=None if set(weights) == {1.0} else weights,
            )  # fmt: skip
    return metrics, left_out
