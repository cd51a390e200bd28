"""The table about repair and training: the same one-for-all training of subnets that were repaired, and as cut."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from product_selection import CUT, REPAIRED, Way, selected
from results import Losses, Results, above, header, row
from subjects import Subject, batches

from amoeba_plugin.training.one_for_all.strengths import fit_strengths
from training import ONE_FOR_ALL, Variant, evaluated, train

DRAWS = 32  # rows of each kind to select on: searching layers as cut takes longest
APART = 16  # rows that strengths are chosen by
FITTED = "trained, at each shape's strength"
VARIANT = Variant("one-for-all, SMOL (factors)", adapter=ONE_FOR_ALL)


def ways(subject: Subject) -> Mapping[str, Way]:
    """Return whole selections, without repair and with it in every step, at the subject's depths and widths."""
    widths = [str(width) for width in subject.widths[:3]]
    return {
        "as cut": Way("auto", CUT, False, {"widths": widths, "repair": CUT}),
        "repaired": Way("lazy_greedy", REPAIRED, True, {"widths": widths}),
    }


def table_training(subject: Subject, results: Results, seeds: Sequence[int], only: Sequence[str] | None = None) -> None:
    """Held-out loss above the dense model's of every shape before and after training, with and without repair, and with
    the strength of the adapter that each shape loses least at on rows that were held out of the training."""
    subject = replace(subject, draws=min(DRAWS, subject.draws))
    shapes = [f"{depth}x{width}" for depth in subject.depths for width in subject.widths[:3]]
    whole, *subnets = shapes
    title = f"Repair, and one-for-all training of the same tokens ({subject.path.name}, {subject.steps} steps)"
    print(header(title, "subnets", [*subnets, "mean"]))
    for when in ("before", "trained", FITTED):
        for name, way in ways(subject).items():
            if only and name not in only:
                continue
            of_seeds = [
                _losses(subject, results, f"training/{name}", way, shapes, seed, when != "before")
                for seed in (seeds[:1] if when == "before" else seeds)
            ]
            dense = of_seeds[0][whole]
            names = [_fitted(shape) if when == FITTED else shape for shape in subnets]
            cells = [above([losses[shape] for losses in of_seeds], dense) for shape in names]
            means = [statistics.mean(losses[shape] for shape in names) for losses in of_seeds]
            print(row(f"{name}, {when}", [*cells, above(means, dense)]), flush=True)


def _losses(
    subject: Subject, results: Results, key: str, way: Way, shapes: Sequence[str], seed: int, trained: bool
) -> Losses:
    chosen = selected(subject, results, key, way, 0)

    def measured() -> Losses:
        elastic = chosen.elastic(subject)
        if not trained:
            return evaluated(subject, elastic, shapes)
        seen = len(subject.training) - APART
        shorter = replace(subject, training=subject.training.select(range(seen)))
        peft_model = train(shorter, VARIANT, elastic, subject.steps, seed, subject.learning_rates[1])
        losses = evaluated(subject, elastic, shapes)
        fit_strengths(elastic, peft_model, batches(subject.training.select(range(seen, seen + APART))))
        weighed = evaluated(subject, elastic, shapes)
        return losses | {_fitted(shape): weighed[shape] for shape in shapes}

    return results.of(f"{key}/trained, strengths {seed}" if trained else f"{key}/before", measured)


def _fitted(shape: str) -> str:
    return f"{shape} at its strength"
