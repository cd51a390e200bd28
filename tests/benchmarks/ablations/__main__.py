"""The design of AmoebaLLM's Tables 3, 4 and 5 (arXiv:2411.10606) on small trained models.

Prints tables in Markdown: held-out loss above the dense model's in nats per token, mean over seeds and, behind it, the
largest difference between seeds. Every finished training is kept in ``--results``; a run that was stopped goes on::

    AMOEBA_TEST_ASSETS=ASSETS python tests/benchmarks/ablations --subject demo --tables 4 3 5 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from subjects import SUBJECTS, Subject
from tqdm.auto import tqdm
from training import ONE_LORA, Losses, Variant, select_widths, train, untrained

from amoeba_plugin.demo.depth_comparison import PUBLISHED
from amoeba_plugin.depth_selectors import DepthTask, random_depths
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.plugins import architecture_for, depth_selector_named, objective_named
from amoeba_plugin.strategy import DepthStrategy, write_atomically

EXPERTS = 3
VARIANTS = (
    Variant("one-for-all, SMOL (factors)"),
    Variant("one-for-all, SMOL (outputs)", adapter=Variant("").adapter | {"combination": "outputs"}),
    Variant("one-for-all, SMOL, random start", adapter=Variant("").adapter | {"router_init": "random"}),
    Variant("one-for-all, SMOL as published", adapter={"num_experts": 5, "top_k": 2}),
    Variant("one-for-all, LoRA of rank r", adapter=ONE_LORA),
    Variant("one-for-all, LoRA of rank 3r", adapter=ONE_LORA, rank_factor=EXPERTS),
    Variant("one-for-all, no balancing", options={"loss_balancing": False}),
    Variant("one-for-all, no distillation", options={"kd_weight": 0.0}),
    Variant("one-for-all, largest trained too", options={"train_largest": True}),
    Variant("each shape alone, same passes in all", adapter=ONE_LORA, own_training="shared"),
    Variant("each shape alone, same passes each", adapter=ONE_LORA, own_training="each"),
)


class Results:
    """Losses by what gave them, in a JSON file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Losses] = json.loads(path.read_bytes()) if path.is_file() else {}

    def of(self, key: str, measure: Callable[[], Losses]) -> Losses:
        """Return what is known under a key; measure and keep it where nothing is."""
        if key not in self._known:
            tqdm.write(key, file=sys.stderr)
            self._known[key] = measure()
            write_atomically(self._path, json.dumps(self._known, indent=1).encode())
        return self._known[key]


def main() -> None:
    """Measure what is not known yet and print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, default="demo")
    parser.add_argument("--tables", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of one-for-all training; default: the subject's")
    parser.add_argument("--variants", nargs="+", help="parts of names: only these rows of Table 4")
    parser.add_argument("--results", type=Path, default=Path("ablations.json"))
    asked = parser.parse_args()
    subject = SUBJECTS[asked.subject]()
    if asked.steps:
        subject = replace(subject, steps=asked.steps)
    results = Results(asked.results.with_stem(f"{asked.results.stem}-{asked.subject}-{subject.steps}"))
    for table in asked.tables:
        TABLES[table](subject, results, range(asked.seeds), asked.variants)


def table_4(subject: Subject, results: Results, seeds: Sequence[int], wanted: Sequence[str] | None) -> None:
    """Ways to train, at 3 depths x 3 widths."""
    shapes = [f"{depth}x{width}" for depth in subject.depths for width in subject.widths[:3]]
    depth, width = search(subject), select_widths(subject, _first(subject))
    dense = results.of("dense", lambda: untrained(subject, depth, width, shapes[:1]))[shapes[0]]
    print(f"\n### Ways to train ({subject.path.name}, {subject.steps} steps)\n\n{_header('training', shapes)}")
    print(_line("none", [results.of("untrained", lambda: untrained(subject, depth, width, shapes))], dense, shapes))
    for variant in VARIANTS:
        if wanted and not any(part in variant.name for part in wanted):
            continue
        losses = [
            results.of(f"4/{variant.name}/{seed}", lambda: train(subject, variant, depth, width, shapes, seed))  # noqa: B023
            for seed in seeds
        ]
        print(_line(variant.name, losses, dense, shapes), flush=True)


def table_3(subject: Subject, results: Results, seeds: Sequence[int], _: Sequence[str] | None) -> None:
    """Ways to choose layers, before and after one-for-all training."""
    layers = subject.depths[0]
    selectors: Mapping[str, Callable[[], DepthStrategy]] = {
        "dynamic program (paper)": lambda: choose(subject),
        "dynamic program + exchanges": lambda: search(subject),
        **{label: lambda name=name: choose(subject, name) for name, label in PUBLISHED.items()},
        "random": lambda: random_depths(layers, range(subject.depths[-1], layers), seed=0),
    }
    _before_and_after("selector", "Ways to choose layers", selectors, subject, results, seeds)


def table_5(subject: Subject, results: Results, seeds: Sequence[int], _: Sequence[str] | None) -> None:
    """Texts to choose layers on, before and after one-for-all training on the subject's own text."""
    selectors = {name: lambda name=name: search(subject, text=name) for name in subject.calibrations}
    _before_and_after("text", "Texts to choose layers on", selectors, subject, results, seeds)


def _before_and_after(
    what: str, title: str, selectors: Mapping[str, Callable[[], DepthStrategy]], subject: Subject, results: Results,
    seeds: Sequence[int],
) -> None:  # fmt: skip
    shapes = [f"{depth}x1" for depth in subject.depths]
    width = select_widths(subject, _first(subject))
    columns = shapes[1:]
    print(f"\n### {title}\n\n{_header(what, [f'{s} {when}' for s in columns for when in ('before', 'after')])}")
    for name, select in selectors.items():
        try:
            depth = select()
        except RecipeError as error:
            print(f"| {name}{' | -' * 2 * len(columns)} |  <!-- {error} -->")
            continue
        before = results.of(f"{title}/{name}/before", lambda: untrained(subject, depth, width, shapes))  # noqa: B023
        after = [
            results.of(f"{title}/{name}/{seed}", lambda: train(subject, VARIANTS[0], depth, width, shapes, seed))  # noqa: B023
            for seed in seeds
        ]
        dense = before[shapes[0]]
        cells = [_cell(losses, shape, dense) for shape in columns for losses in ([before], after)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def search(subject: Subject, text: str | None = None) -> DepthStrategy:
    """Choose layers on one text as the demo's recipe does."""
    return choose(subject, "dynamic_program", text, {"exchanges": 1})


def choose(
    subject: Subject,
    selector: str = "dynamic_program",
    text: str | None = None,
    options: Mapping[str, int] | None = None,
) -> DepthStrategy:
    """Choose layers by a selector's name."""
    model = subject.model()
    calibration = subject.calibrations[text] if text else _first(subject)
    task = DepthTask(
        model, architecture_for(model.config.model_type), objective_named("loss"), calibration,
        min_depth=subject.depths[-1], options=options or {},
    )  # fmt: skip
    return depth_selector_named(selector).select(task)


def _first(subject: Subject) -> list:  # type: ignore[type-arg]
    return next(iter(subject.calibrations.values()))


def _header(what: str, columns: Sequence[str]) -> str:
    return f"| {what} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"


def _line(name: str, losses: Sequence[Losses], dense: float, shapes: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(_cell(losses, shape, dense) for shape in shapes)} |"


def _cell(losses: Sequence[Losses], shape: str, dense: float) -> str:
    values = [each[shape] - dense for each in losses if shape in each]
    if not values:
        return "-"
    spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{spread}"


TABLES = {"4": table_4, "3": table_3, "5": table_5}

if __name__ == "__main__":
    main()
