"""What an elastic service answers right within its targets, beside what else fits them (the design of ELMS, section 4).

Six apps, each a pair of targets and a task, asked as often as the paper's traces ask them, ``600 e^(a i)``. Each prompt
is computed at every shape and share once: whether it is answered right, and the CPU seconds of its prefill, switch
included. A policy's figures are the expectation over all traces, one request at a time. Answers are kept in
``--results``; a run that was stopped goes on::

    amoeba profile ELASTIC --flow torch:elastic -o PROFILE
    AMOEBA_TEST_ASSETS=ASSETS python tests/benchmarks/elastic_service.py ELASTIC PROFILE

Targets are shares of what the whole model takes; those that no shape keeps by the profile are said and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from amoeba_plugin.data.multiple_choice import QuestionColumns, read_questions
from amoeba_plugin.data.prompted import PromptedQuestion, prompted
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import SloError
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.serving.compact.features import Features
from amoeba_plugin.serving.compact.heads import Choices, marked
from amoeba_plugin.serving.compact.labels import SCORE_LABELS, chosen, shortened
from amoeba_plugin.serving.compact.reader import CompactModel
from amoeba_plugin.serving.compact.training import Read, trained_decisions, trained_scores
from amoeba_plugin.serving.compact.tune import SHARES, spread
from amoeba_plugin.serving.deciders import Decider, decided
from amoeba_plugin.serving.feasible import Asked, Decision, Feasible, LatencyOf, Prompt, feasible, profiled
from amoeba_plugin.serving.reading import Reading
from amoeba_plugin.serving.registry import decider_named
from amoeba_plugin.serving.slo import Slo, Target
from amoeba_plugin.shape import ShapeSpace

ASSETS = Path(os.environ.get("AMOEBA_TEST_ASSETS", "")) / "eval"
APPS = [  # shares of the whole model's time to the first token and for each behind it (the paper's), and the task
    (1.0, 1.0, "openbook_qa"), (0.8, 0.9, "arc_easy"), (0.6, 0.8, "arc_challenge"),
    (0.4, 0.7, "piqa"), (0.2, 0.6, "arc_easy"), (0.2, 0.5, "openbook_qa"),
]  # fmt: skip
SKEWS, SHOTS, ANSWER = (0.0, 0.25, -0.25), 5, 16
READING, SLACK = 0.05, 1.05  # of the whole model's time, kept back for reading; what measurements may exceed targets by
App = tuple[float, float, str]
Allowed = Callable[[Decision], bool]
Make = Callable[[str], Decider]  # of a task


@dataclass(frozen=True)
class Measured:
    """A question at every shape and share."""

    question: PromptedQuestion
    reading: Reading
    read: float  # CPU seconds
    right: Mapping[Decision, bool]
    ttft: Mapping[Decision, float]  # CPU seconds


@dataclass(frozen=True)
class Took:
    """CPU seconds of a token by shape, and the decision that is the whole model on the whole prompt."""

    decode: Mapping[str, float]
    whole: Decision


def questions_of(task: str, tokenizer: object, count: int) -> list[PromptedQuestion]:
    columns = QuestionColumns(question="query", answer="gold")
    found = read_questions(str(ASSETS / f"{task}.jsonl"), "train", columns)
    random.Random(0).shuffle(found)
    found = [replace(each, text=each.text.strip()) for each in found]
    return [prompted(each, found[:SHOTS], tokenizer, False, 2048) for each in found[SHOTS : SHOTS + count]]  # type: ignore[arg-type]


class Kept:
    """Answers and seconds by task, number, label of scores, shape and share, on disk after every question."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, json.loads(path.read_text()) if path.exists() else {}

    def of(self, key: str, compute: Callable[[], list[list[float]]]) -> list[list[float]]:
        if key not in self.rows:
            self.rows[key] = compute()
            write_atomically(self.path, json.dumps(self.rows).encode())
        found: list[list[float]] = self.rows[key]
        return found


def trials(
    live: ElasticModel, question: PromptedQuestion, scores: Sequence[float], choices: Choices
) -> list[list[float]]:
    """Return, for shapes x shares, whether it is answered right and the CPU seconds of the prefill, switch included."""
    backend, found = TorchBackend(live), []
    for shape in choices.shapes:
        for share in choices.shares:
            tokens = shortened(question, scores, share)
            before = time.process_time()
            cache, behind = backend.prefill(shape, tokens)
            took = time.process_time() - before
            found.append([float(chosen(live, cache, behind, question.choices) == question.answer), took])
    return found


def decode_seconds(live: ElasticModel, choices: Choices) -> Mapping[str, float]:
    """Return CPU seconds of a token behind 200 others, the median of 15, shapes interleaved."""
    backend, took = TorchBackend(live), {str(shape): [] for shape in choices.shapes}
    for turn in range(15):
        for shape in choices.shapes:
            cache, _ = backend.prefill(shape, [5 + turn] * 200)
            before = time.process_time()
            backend.step(shape, cache, 7)
            took[str(shape)].append(time.process_time() - before)
    return {shape: statistics.median(each) for shape, each in took.items()}


def tuned(
    features: Features, train: Sequence[PromptedQuestion], label: str, live: ElasticModel, kept: Kept, choices: Choices
) -> CompactModel:
    reads = [Read(features(each.prompt), marked(each.droppable, len(each.prompt))) for each in train]
    scores, explained = trained_scores(reads, [SCORE_LABELS[label](live, each) for each in train])
    rows = []
    for number, (each, read) in enumerate(zip(train, reads, strict=True)):
        given = scores(read.features).tolist()
        key = f"train/{label}/{number}"
        rows.append(kept.of(key, lambda e=each, g=given: trials(live, e, g, choices)))  # type: ignore[misc]
        print(f"\r{key}", end="", flush=True)
    shape = (len(train), len(choices.shapes), len(choices.shares))
    right = torch.tensor([[cell[0] for cell in row] for row in rows]).view(shape) > 0
    decisions, nats = trained_decisions(reads, right, choices)
    print(f"\n{label}: scores explain {explained:.2f} of held-out labels, an answer costs {nats:.3f} nats to foresee")
    for index, each in enumerate(choices.shapes):
        print(f"  {each}: right at {'/'.join(map(str, choices.shares))}: {right[:, index].float().mean(0).tolist()}")
    return CompactModel(features, scores, decisions, choices)


def measured(model: CompactModel, key: str, question: PromptedQuestion, live: ElasticModel, kept: Kept) -> Measured:
    before = time.process_time()
    reading = model(Request(question.prompt, droppable=question.droppable))
    read = time.process_time() - before
    rows = kept.of(key, lambda: trials(live, question, reading.scores, model.choices))
    print(f"\r{key}  ", end="", flush=True)
    decisions = [Decision(shape, share) for shape in model.choices.shapes for share in model.choices.shares]
    right = {each: bool(row[0]) for each, row in zip(decisions, rows, strict=True)}
    return Measured(question, reading, read, right, {each: row[1] for each, row in zip(decisions, rows, strict=True)})


def options(app: App, asked: Measured, latency_of: LatencyOf, choices: Choices, allowed: Allowed) -> Feasible:
    """Return what a request may get, its targets behind the reading of its prompt."""
    ttft, tpot, _ = app
    question = asked.question
    space = ShapeSpace(
        tuple(sorted({each.depth for each in choices.shapes}, reverse=True)),
        tuple(sorted({each.width for each in choices.shapes}, reverse=True)),
    )
    given = Asked(
        Prompt(len(question.prompt), len(question.droppable)), ANSWER, Slo(Target(ttft, True), Target(tpot, True))
    )
    found = feasible(space, latency_of, given, choices.shares)
    latencies = {each: latency for each, latency in found.latencies.items() if allowed(each)}
    return replace(found, limits=found.limits.behind(READING * found.whole.ttft), latencies=latencies)


def outcome(decider: Decider, app: App, asked: Measured, found: Feasible, took: Took) -> tuple[bool, bool, bool]:
    """Return whether a request is served, in time, and answered right in time."""
    try:
        decision = decided(decider, found, asked.reading)
    except SloError:
        return False, False, False
    # machines change by the hour: targets are shares of what the whole model took beside it
    whole = asked.ttft[took.whole]
    within = asked.ttft[decision] + asked.read <= app[0] * whole * SLACK
    within &= took.decode[str(decision.shape)] <= app[1] * took.decode[str(took.whole.shape)] * SLACK
    return True, within, within and asked.right[decision]


def policies(train: Mapping[str, Sequence[Measured]], choices: Choices) -> Mapping[str, tuple[Make, Allowed]]:
    """Return what decides, of a task, and among what."""
    whole, least = choices.shapes[0], choices.shapes[-1]
    usual = {
        task: {each: statistics.mean(one.right[each] for one in of) for each in of[0].right}
        for task, of in train.items()
    }

    def named(name: str) -> Make:
        return lambda task: decider_named(name)

    def oracle(task: str) -> Decider:
        return lambda found, reading: max(found.decisions, key=usual[task].__getitem__, default=None)

    return {
        "dual head": (named("dual_head"), lambda each: True),
        "oracle: best pair of target and task, on training questions": (oracle, lambda each: True),
        "largest feasible": (named("largest_feasible"), lambda each: True),
        "random feasible": (named("random_feasible"), lambda each: True),
        "no decision head, no shortened prompt": (named("largest_feasible"), lambda each: each.share == 1),
        "depth only": (named("largest_feasible"), lambda each: each.share == 1 and each.shape.width == 1),
        "prompt only": (named("largest_feasible"), lambda each: each.shape == whole),
        "one static shape": (named("largest_feasible"), lambda each: each.shape == least and each.share == 1),
    }


def table(
    test: Mapping[str, Sequence[Measured]], train: Mapping[str, Sequence[Measured]], apps: Sequence[App],
    latency_of: LatencyOf, choices: Choices, took: Took,
) -> None:  # fmt: skip
    """Print accuracy in time by how requests are spread over apps, and against the dual head, paired by question."""
    print(
        "| policy | served | of these in time |", *(f"right, a = {skew:g} |" for skew in SKEWS), "dual head ahead by |"
    )
    print("|---|---|---|" + "---|" * (len(SKEWS) + 1))
    ours: list[list[float]] = []
    for name, (make, allowed) in policies(train, choices).items():
        cells, right = [], []
        for app in apps:
            decider = make(app[2])
            found = [
                outcome(decider, app, one, options(app, one, latency_of, choices, allowed), took)
                for one in test[app[2]]
            ]
            cells.append([statistics.mean(float(each[index]) for each in found) for index in range(3)])
            right.append([float(each[2]) for each in found])
        ours = ours or right
        served = statistics.mean(cell[0] for cell in cells)
        within = statistics.mean(cell[1] for cell in cells) / served if served else 0.0
        shares = [sum(w * cell[2] for w, cell in zip(weights(skew, len(apps)), cells, strict=True)) for skew in SKEWS]
        print(
            f"| {name} | {served:.1%} | {within:.1%} |",
            *(f"{share:.1%} |" for share in shares),
            ahead(ours, right),
            "|",
        )


def weights(skew: float, apps: int) -> list[float]:
    """Return how often each app asks, in expectation: the paper's 600 e^(a i), i = 1 the tightest."""
    each = [math.exp(skew * (apps - index)) for index in range(apps)]
    return [one / sum(each) for one in each]


def ahead(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> str:
    """Return the difference in points with the 95 % interval of a bootstrap over questions."""
    pairs = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(ours, theirs, strict=True)]
    if not any(any(each) for each in pairs):
        return "-"
    draw = random.Random(0)
    means = sorted(
        statistics.fmean(statistics.fmean(draw.choices(each, k=len(each))) for each in pairs) for _ in range(1000)
    )
    middle = statistics.fmean(statistics.fmean(each) for each in pairs)
    return f"{100 * middle:+.1f} ({100 * means[25]:+.1f} to {100 * means[-25]:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elastic", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--questions", type=int, default=40, help="per task, of training and of test each")
    parser.add_argument("--labels", default="self_information")
    parser.add_argument("--results", type=Path, default=Path("elastic_service.json"))
    asked = parser.parse_args()
    live, _ = load_elastic(asked.elastic)
    tokenizer, kept = load_tokenizer(str(live.config.name_or_path)), Kept(asked.results)
    choices = Choices(spread(live.space), SHARES)
    tasks = {task: questions_of(task, tokenizer, 2 * asked.questions) for task in dict.fromkeys(app[2] for app in APPS)}
    train = {task: each[: asked.questions] for task, each in tasks.items()}
    model = tuned(Features(live), [one for each in train.values() for one in each], asked.labels, live, kept, choices)
    numbers = iter(range(len(tasks) * asked.questions))
    seen = {
        task: [measured(model, f"train/{asked.labels}/{next(numbers)}", one, live, kept) for one in each]
        for task, each in train.items()
    }
    test = {
        task: [
            measured(model, f"test/{asked.labels}/{task}/{number}", one, live, kept)
            for number, one in enumerate(each[asked.questions :])
        ]
        for task, each in tasks.items()
    }
    latency_of = profiled(Profile.load(asked.profile), "torch:elastic")
    took = Took(decode_seconds(live, choices), Decision(choices.shapes[0], choices.shares[0]))
    whole = took.decode[str(took.whole.shape)]
    print("\ndecode, of the whole model's:", {shape: round(each / whole, 3) for shape, each in took.decode.items()})
    least = min(took.decode.values()) / whole
    apps = [app for app in APPS if app[1] >= least]
    print(
        f"{len(APPS) - len(apps)} apps want less than the {least:.2f} that the smallest shape takes, and are left out"
    )
    read = statistics.median(one.read / one.ttft[took.whole] for each in test.values() for one in each)
    print(f"reading takes {read:.1%} of the whole model's time to the first token")
    table(test, seen, apps, latency_of, choices, took)


if __name__ == "__main__":
    main()
