"""The tables about totals and depths: what several selections leave of a model, nothing trained.

Perplexities and answers are of texts and questions that nothing was chosen on. The results keep every row's loss and
every question's answer, so that two ways are compared on the same ones.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence

import torch
from product_selection import CUT, REPAIRED, Selected, Way, selected
from results import Results, header, row
from subjects import Subject

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, PerTokenLoss

TOTALS = ["4/5", "13/20", "1/2"]
WIDTHS = ["1", *TOTALS]
BASELINE, LOCALLY = "all layers, repaired", "local_least_squares"
RESAMPLES = 2000

# by name; the published ways have the whole width's layers at the ends, and rows of their own for what they are
SELECTIONS: Mapping[str, Way] = {
    BASELINE: Way(width={"widths": WIDTHS}),
    "all layers, repaired locally": Way(width={"widths": WIDTHS, "repair": LOCALLY}),
    "all layers, repaired, flap": Way(width={"widths": WIDTHS, "importance": "flap"}),
    "depth and width, searched repaired": Way("lazy_greedy", REPAIRED, True, {"totals": TOTALS}),
    "depth and width, searched as cut": Way("lazy_greedy", CUT, True, {"totals": TOTALS}),
    "all layers, as cut": Way(width={"widths": WIDTHS, "repair": CUT}),
    "all layers, biases": Way(width={"widths": WIDTHS, "bias_compensation": True}),
    "FLAP: global, biases": Way(width={"widths": WIDTHS, "allocation": "global", "bias_compensation": True}),
    "LLM-Pruner's rule: Taylor, layers 4 to 27": Way(
        width={"widths": WIDTHS, "importance": "taylor", "anchor_layers": [0, 1, 2, 3, 28, 29], "repair": CUT}
    ),
    "whole first and last layers, repaired": Way(width={"widths": WIDTHS, "anchor_layers": [0, 1, 28, 29]}),
    "whole first and last layers, biases": Way(
        width={"widths": WIDTHS, "anchor_layers": [0, 1, 28, 29], "bias_compensation": True}
    ),
}
DEPTHS: Mapping[str, Way] = {
    "lazy greedy as cut, then repaired": Way("lazy_greedy", CUT, True),
    "lazy greedy, searched repaired": Way("lazy_greedy", REPAIRED, True),
    "lazy greedy, as cut": Way("lazy_greedy"),
    "program (paper), as cut": Way("dynamic_program"),
    "auto, searched repaired": Way("auto", REPAIRED, True),
}


def table_totals(
    subject: Subject, results: Results, seeds: Sequence[int] = (0,), only: Sequence[str] | None = None
) -> None:
    """What is left of shares of the blocks, by selection, against the same layers of repaired width."""
    _table("totals", "The best subnets of a share of the blocks", SELECTIONS, TOTALS, subject, results, seeds, only)


def table_depths(
    subject: Subject, results: Results, seeds: Sequence[int] = (0,), only: Sequence[str] | None = None
) -> None:
    """What is left of two depths at the whole width, by selection, against layers chosen as cut and then repaired."""
    depths = [str(depth) for depth in subject.depths[1:]]
    _table("depths", "Layers that are gone", DEPTHS, depths, subject, results, seeds, only)


def _table(
    table: str, title: str, ways: Mapping[str, Way], asked: Sequence[str], subject: Subject, results: Results,
    seeds: Sequence[int], only: Sequence[str] | None,
) -> None:  # fmt: skip
    columns = [f"{each}, {what}" for what in (*subject.reports, *subject.questions) for each in asked]
    print(header(f"{title}, nothing trained ({subject.path.name})", "selection", [*columns, "shapes", "CPU s"]))
    baseline: dict[str, list[float]] = {}
    for name, way in ways.items():
        if only and not any(part in name for part in only):
            continue
        found: dict[str, list[list[float]]] = {}
        for seed in seeds:
            key = f"{table}/{name}/{seed}"
            chosen = selected(subject, results, key, way, seed)
            for column, values in _measured(subject, results, key, chosen, seed == seeds[0]).items():
                found.setdefault(column, []).append(values)
        means = {column: [statistics.mean(each) for each in zip(*of, strict=True)] for column, of in found.items()}
        baseline = baseline or means
        cells = [_cell(column, found[column], means[column], baseline.get(column)) for column in columns]
        print(row(name, [*cells, ", ".join(chosen.shapes.values()), f"{chosen.seconds:.0f}"]), flush=True)


def _measured(
    subject: Subject, results: Results, key: str, chosen: Selected, with_questions: bool
) -> dict[str, list[float]]:
    """Return the loss of every row of every text and, where asked for, whether every question is answered right."""
    live: list[ElasticModel] = []

    def measured(shape: str, batches: Sequence[Batch], questions: bool) -> list[float]:
        live.extend([] if live else [chosen.elastic(subject)])
        with live[0].active(shape) as model, torch.no_grad():
            return (_answers if questions else _losses)(model.eval(), batches)

    found = {}
    for asked, shape in chosen.shapes.items():
        for questions, sets in ((False, subject.reports), (True, subject.questions if with_questions else {})):
            for name, batches in sets.items():
                column = f"{asked}, {name}"
                found[column] = results.of(f"{key}/{column}", lambda s=shape, b=batches, q=questions: measured(s, b, q))
    return found


def _losses(model: torch.nn.Module, batches: Sequence[Batch]) -> list[float]:
    rows = torch.cat([PerTokenLoss().observe(model, batch) for batch in batches])  # type: ignore[arg-type]
    return (rows[:, 0] / rows[:, 1]).tolist()


def _answers(model: torch.nn.Module, batches: Sequence[Batch]) -> list[float]:
    """Return 1 for every question answered right, in their order, and 0 for others."""
    accuracy = MultipleChoiceAccuracy()
    seen = torch.cat([accuracy.observe(model, batch) for batch in batches])  # type: ignore[arg-type]
    return [accuracy.score(seen[seen[:, 2] == question]).value for question in seen[:, 2].unique()]


def _cell(column: str, of_seeds: Sequence[Sequence[float]], means: list[float], baseline: list[float] | None) -> str:
    """Return perplexity or percent answered, over seeds, and against the first row with a paired 95 % interval."""
    questions = set(means) <= {0.0, 1.0}
    shown = [100 * statistics.mean(each) if questions else math.exp(statistics.mean(each)) for each in of_seeds]
    spread = f" ±{statistics.stdev(shown):.1f}" if len(shown) > 1 else ""
    against = ""
    if baseline is not None and baseline != means:
        low, middle, high = _paired([a - b for a, b in zip(means, baseline, strict=True)])
        against = (
            f" ({100 * middle:+.1f}: {100 * low:+.1f} to {100 * high:+.1f})" if questions
            else f" (x{math.exp(middle):.2f}: {math.exp(low):.2f} to {math.exp(high):.2f})"
        )  # fmt: skip
    return f"{statistics.mean(shown):.1f}{spread}{against}"


def _paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of paired differences between the ends of its bootstrapped 95 % interval."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], statistics.fmean(differences), means[-RESAMPLES // 40]
