"""What a search within a budget is worth, on this machine: four questions, each a command.

::

    BENCH="python tests/benchmarks/budget_search.py --elastic DIR --base DIR --work DIR --dataset HELD_OUT.txt"
    $BENCH keeps --flow llama-cpp:Q4_0    # does the choice keep its budget when it is measured again?
    $BENCH few --flow llama-cpp:Q4_0      # hierarchical against exhaustive, of a hundred shapes or more
    $BENCH joint                          # shape and scheme together, against one after the other
    $BENCH differ --flow llama-cpp:Q4_0 --flow torch:fp32     # where flows and phases do not have the same best shape

Whatever was computed is kept in ``--work``, a directory for each checkpoint; the same command goes on from
there. Times are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_plugin.deployment.budget import Budget, Limit
from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.asked import flows_of
from amoeba_plugin.deployment.profiling.cost_model import Prediction, cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, measure_shapes, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.search import evaluators
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.exhaustive import exhaustive
from amoeba_plugin.deployment.search.harm import harm_of
from amoeba_plugin.deployment.search.hierarchical import hierarchical
from amoeba_plugin.deployment.search.problem import Choice, Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.deployment.search.run import ShapeSearch
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.shape import SubnetShape

WITHIN = 1.05  # of a limit, when a choice is measured again
SCHEMES, EXACT = ("F16", "Q8_0", "Q4_0"), "F16"
FLOW = "llama-cpp"


@dataclass
class Bench:
    """A checkpoint, how it is judged, and what was computed before."""

    live: ElasticModel
    subject: Subject
    asked: Asked
    work: Path
    how: Measuring
    name: str

    def kept(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what was computed under a key, now or before."""
        path = self.work / "results.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if key not in known:
            begun = time.process_time()
            found = compute()
            known = json.loads(path.read_text()) if path.is_file() else {}
            known[key] = found
            write_atomically(path, json.dumps(known, indent=1).encode())
            print(f"  {key}: {found if isinstance(found, float) else '...'} ({time.process_time() - begun:.0f} s)")
        return known[key]

    def profile(self, points: Sequence[str]) -> Profile:
        """Return a profile of some flows, of a quarter of the shapes."""
        path = self.work / "profile.json"
        if not path.is_file() or set(points) - Profile.load(path).flows.keys():
            profile_model(self.subject, flows_of(points), path, self.how, self.name)
        return Profile.load(path)

    def loss(self, shape: SubnetShape, seed: int = 0) -> Quality:
        """Return a shape's loss."""
        asked = self.asked

        def judged() -> dict[str, Any]:
            evaluators.SEED = seed
            judge = evaluators.loss(self.live, load_tokenizer(str(self.live.config.name_or_path)), asked)
            return vars(judge.judge(shape))

        found = self.kept(f"loss {shape} seed {seed}", judged)
        samples = tuple(tuple((above, below) for above, below in each) for each in found["samples"])
        return Quality(found["value"], found["low"], found["high"], samples)

    def harm(self, choice: Choice, seed: int = 0) -> float:
        """Return what a scheme adds to a shape's loss."""
        if choice.point.scheme == EXACT:
            return 0.0

        def measured() -> float:
            evaluators.SEED = seed
            judge = evaluators.loss(self.live, load_tokenizer(str(self.live.config.name_or_path)), self.asked)
            return harm_of(self.live, judge)(choice).value

        return float(self.kept(f"harm {choice} seed {seed}", measured))

    def predicted(self, profile: Profile, choice: Choice, limit: Limit) -> Prediction:
        """Return what a profile says of a choice."""
        model = cost_models(profile.flows[str(choice.point)])[limit.kind]
        return model.predict(Work.of(self.subject.sizes(choice.shape)), limit.tokens)

    def again(self, choice: Choice, limit: Limit) -> float:
        """Measure a choice once more, in other processes, which do not know what was measured of it before."""
        known = Profile.load(self.work / "profile.json")
        of = known.flows[str(choice.point)]
        others = {name: cost for name, cost in of.shapes.items() if name != str(choice.shape)}
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "again.json"
            profile = known.model_copy(update={"flows": {str(choice.point): of.model_copy(update={"shapes": others})}})
            profile.save(path)
            measure_shapes(self.subject, flows_of([str(choice.point)]), profile, path, self.how, [choice.shape])
            return self.predicted(profile, choice, limit).value


def limits_of(bench: Bench, profile: Profile, point: str, count: int) -> list[Limit]:
    """Draw limits of decoding, prefill and memory in turn, uniformly between the least and the most predicted."""
    draw, longest, found = random.Random(point), max(bench.how.prompts), []
    for number in range(count):
        kind = ("decode", "prefill", "memory")[number % 3]
        about = Limit(kind, 1.0, longest if kind == "prefill" else 0)
        costs = [bench.predicted(profile, Choice(shape, Point.parse(point)), about).value for shape in bench.live.space]
        found.append(replace(about, most=draw.uniform(min(costs), max(costs))))
    return found


def keeps(bench: Bench, flows: Sequence[str], count: int) -> None:
    """Print how often the choice keeps its budget when it is measured again."""
    profile = bench.profile(flows)
    for point in flows:
        limits = limits_of(bench, profile, point, count)
        ratios, measured = [], []
        for number, limit in enumerate(limits):

            def searched(limit: Limit = limit, point: str = point) -> dict[str, Any]:
                with tempfile.TemporaryDirectory() as place:  # what one search measures, the next does not know
                    path, begun = Path(place) / "profile.json", time.process_time()
                    profile.save(path)
                    found = ShapeSearch(bench.live, path, bench.asked, _Known(bench), progress=False).within(
                        Budget((Point.parse(point),), (limit,))
                    )
                took, choice = time.process_time() - begun, Choice(SubnetShape.parse(found.chosen), Point.parse(point))
                ratio = bench.again(choice, limit) / limit.most
                return {"chosen": found.chosen, "ratio": ratio, "measured": found.measured, "seconds": took}

            told = bench.kept(f"keeps {point} {number} {limit}", searched)
            ratios.append(told["ratio"])
            measured.append(told["measured"])
        held, exactly = (statistics.mean(each <= most for each in ratios) for most in (WITHIN, 1.0))
        ran = statistics.mean(measured)
        print(f"| {point} | {len(ratios)} | {held:.0%} | {exactly:.0%} | {max(ratios):.3f} | {ran:.1f} |", flush=True)


class _Known(evaluators.Judge):
    """Judges by losses that are kept; schemes are not looked at, only costs matter here."""

    unit = "nats per token"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def judge(self, shape: SubnetShape) -> Quality:
        return self._bench.loss(shape)


def few(bench: Bench, flows: Sequence[str], count: int) -> None:
    """Print how near the hierarchical search comes to the exhaustive one, by the same profile."""
    profile, space = bench.profile(flows), bench.live.space
    losses = {shape: bench.loss(shape) for shape in space}
    for point in flows:
        regrets, shares = [], []
        for limit in limits_of(bench, profile, point, count):
            budget = Budget((Point.parse(point),), (limit,))

            def costs(choice: Choice, limit: Limit = limit) -> Mapping[Limit, Prediction]:
                return {limit: bench.predicted(profile, choice, limit)}

            memo = {Choice(shape, budget.point): costs(Choice(shape, budget.point)) for shape in space}
            sure = {each: {limit: replace(cost[limit], measured=True)} for each, cost in memo.items()}
            every, some = (Problem(space, budget, sure.__getitem__, losses.__getitem__) for _ in range(2))
            best, found = exhaustive(every), hierarchical(some)
            regrets.append(losses[found.shape].value - losses[best.shape].value)
            shares.append(len(some.qualities) / len(space))
        near = statistics.mean(regret <= 0.01 for regret in regrets)
        evaluated = f"{statistics.mean(shares):.0%} | {max(shares):.0%}"
        print(
            f"| {point} | {len(space)} | {len(regrets)} | {near:.0%} | {max(regrets):.4f} | {evaluated} |", flush=True
        )


def joint(bench: Bench, seeds: Sequence[int]) -> None:
    """Print hypervolumes of loss, decoding and bytes: of what each way would take, by what its engine makes of it."""
    points = [Point(FLOW, scheme) for scheme in SCHEMES]
    profile, limits = bench.profile([str(point) for point in points]), (Limit("decode", 1.0), Limit("file", 1.0))
    choices = [Choice(shape, point) for point in points for shape in bench.live.space]
    costs = np.array([[bench.predicted(profile, each, limit).value for limit in limits] for each in choices])
    for seed in seeds:
        plain = np.array([bench.loss(each.shape, seed).value for each in choices])
        true = plain + np.array([bench.harm(each, seed) for each in choices])
        largest = {point: bench.harm(Choice(bench.live.space.largest, point), seed) for point in points}
        guessed = plain + np.array([largest[each.point] for each in choices])
        at = {point: [number for number, each in enumerate(choices) if each.point == point] for point in points}
        first = front(np.column_stack([plain[at[points[0]]], costs[at[points[0]]]]))
        ways = {"joint": front(np.column_stack([guessed, costs])), "all": list(range(len(choices)))}
        for point in points[1:]:
            ways[f"shape, then {point.scheme}"] = [at[point][number] for number in first]
        ways["shape, then each"] = [at[point][number] for point in points for number in first]
        cells = np.column_stack([true, costs])
        worst = cells.max(axis=0) * 1.01
        volumes = {name: hypervolume(cells[taken], worst) for name, taken in ways.items()}
        print(f"seed {seed}: " + ", ".join(
            f"{name} {volume / volumes['all']:.4f} ({len(ways[name])} choices)" for name, volume in volumes.items()
        ), flush=True)  # fmt: skip
        harms = {point.scheme: (true - plain)[at[point]] for point in points[1:]}
        print("  harm: " + ", ".join(f"{name} {each.min():+.4f} to {each.max():+.4f}" for name, each in harms.items()))


def front(cells: np.ndarray) -> list[int]:
    """Return the rows that no other is as good as in everything, and better in something."""
    return [
        row for row, each in enumerate(cells)
        if not any((other <= each).all() and (other < each).any() for other in cells)
    ]  # fmt: skip


def hypervolume(cells: np.ndarray, worst: np.ndarray) -> float:
    """Return the volume that rows dominate, up to the worst: by cells of the grid of their coordinates."""
    edges = [np.append(np.unique(column), limit) for column, limit in zip(cells.T, worst, strict=True)]
    covered = np.zeros([len(edge) - 1 for edge in edges], dtype=bool)
    for row in cells:
        covered[
            tuple(slice(int(np.searchsorted(edge, value)), None) for edge, value in zip(edges, row, strict=True))
        ] = True
    sizes = np.diff(edges[0])[:, None, None] * np.diff(edges[1])[None, :, None] * np.diff(edges[2])[None, None, :]
    return float((covered * sizes).sum())


def differ(bench: Bench, flows: Sequence[str]) -> None:
    """Print the best shape by flow and phase, at shares of what the whole model takes there, and where they differ."""
    profile, space = bench.profile(flows), bench.live.space
    losses = {shape: bench.loss(shape) for shape in space}
    phases = [Limit("decode", 1.0), Limit("prefill", 1.0, max(bench.how.prompts))]
    for share in (0.9, 0.8, 0.7, 0.6):
        best, costs = {}, {}
        for point in map(Point.parse, flows):
            for phase in phases:
                costs[point, phase] = {each: bench.predicted(profile, Choice(each, point), phase) for each in space}
                most = share * costs[point, phase][space.largest].value
                kept = [each for each in space if costs[point, phase][each].high <= most]
                best[point, phase] = min(kept, key=lambda each: losses[each].value) if kept else None
        for (point, phase), shape in best.items():
            least = costs[point, phase]
            sure = [
                f"{other} exceeds it, the best of {where[0]} {where[1].kind}"
                for where, other in best.items()
                if shape is not None
                and other not in (None, shape)
                and least[other].low > share * least[space.largest].value
            ]
            loss = "-" if shape is None else f"{losses[shape].value:.3f}"
            told = "; ".join(dict.fromkeys(sure))
            print(f"| {share:.0%} | {point} {phase.kind} | {shape or 'none'} | {loss} | {told} |")


def main() -> None:
    """Read what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("keeps", "few", "joint", "differ"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--elastic", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--flow", action="append", default=[])
    parser.add_argument("--budgets", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompts", default="32,96,192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", type=int, help="that are profiled; default a quarter, 8 at least")
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    live, _ = load_elastic(told.elastic, told.base)
    how = Measuring(tuple(map(int, told.prompts.split(","))), 16, told.rounds, shapes=told.shapes)
    asked = Asked("hierarchical", told.dataset, num_samples=told.rows)
    bench = Bench(live, Subject.of(live.config, live.space, live.strategy), asked, told.work, how, str(told.elastic))
    if told.question == "joint":
        joint(bench, range(told.seeds))
    elif told.question == "differ":
        differ(bench, told.flow)
    else:
        {"keeps": keeps, "few": few}[told.question](bench, told.flow, told.budgets)


if __name__ == "__main__":
    main()
