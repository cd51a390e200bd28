"""Choosing layers and channels for an ablation, and the tables about it: the paper's Tables 3 and 5, and widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import get_args

from results import Losses, Results, above, header, row
from subjects import Allocation, Subject

from amoeba_plugin.demo.depth_comparison import PUBLISHED
from amoeba_plugin.elastic.strategy import DepthStrategy, WidthStrategy
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.depth.selectors import random_depths
from amoeba_plugin.selection.depth.task import DepthTask, SearchOptions
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.importance import GroupImportance
from amoeba_plugin.selection.registry import depth_selector_named, importance_named, objective_named
from amoeba_plugin.selection.width.measured import measured_widths
from amoeba_plugin.selection.width.ranking import coupled_parameters, rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from training import Space, Variant, trained, untrained

OURS = Variant("one-for-all, SMOL (factors)")


def table_3(subject: Subject, results: Results, seeds: Sequence[int], _: Sequence[str] | None = None) -> None:
    """Ways to choose layers, before and after one-for-all training."""
    layers = subject.depths[0]
    selectors: Mapping[str, Callable[[], DepthStrategy]] = {
        "dynamic program (paper)": lambda: choose_layers(subject),
        "dynamic program + exchanges": lambda: search(subject),
        **{label: lambda name=name: choose_layers(subject, name) for name, label in PUBLISHED.items()},
        "random": lambda: random_depths(layers, range(subject.depths[-1], layers), seed=0),
    }
    _before_and_after("selector", "Ways to choose layers", selectors, subject, results, seeds)


def table_5(subject: Subject, results: Results, seeds: Sequence[int], _: Sequence[str] | None = None) -> None:
    """Texts to choose layers on, before and after one-for-all training on the subject's own text."""
    selectors = {name: lambda name=name: search(subject, text=name) for name in subject.calibrations}
    _before_and_after("text", "Texts to choose layers on", selectors, subject, results, seeds)


def table_widths(subject: Subject, results: Results, *_: object) -> None:
    """Ways to choose how much each layer keeps of attention and MLP, before any training."""
    layers = subject.depths[0]
    shapes = [f"{layers}x{width}" for width in subject.widths[:3]]
    whole, *columns = shapes
    print(header(f"Ways to choose sizes, before training ({subject.path.name})", "allocation", columns))
    for importance in ("flap", "taylor"):
        for allocation in get_args(Allocation):

            def before(importance: str = importance, allocation: Allocation = allocation) -> Losses:
                widths = choose_channels(subject, importance, subject.widths[:3], allocation)
                space = Space(DepthStrategy.whole(layers), widths, (layers,), subject.widths[:3])
                return untrained(subject, space, shapes)

            losses = results.of(f"widths/{importance}/{allocation}", before)
            print(row(f"{allocation}, {importance}", [above([losses[s]], losses[whole]) for s in columns]), flush=True)


def _before_and_after(
    what: str, title: str, selectors: Mapping[str, Callable[[], DepthStrategy]], subject: Subject, results: Results,
    seeds: Sequence[int],
) -> None:  # fmt: skip
    shapes = [f"{depth}x1" for depth in subject.depths]
    width = choose_channels(subject)
    columns = shapes[1:]
    print(header(title, what, [f"{shape} {when}" for shape in columns for when in ("before", "after")]))
    for name, select in selectors.items():
        try:
            space = Space(select(), width, subject.depths, subject.widths[:3])
        except RecipeError as error:
            print(f"{row(name, ['-'] * 2 * len(columns))}  <!-- {error} -->")
            continue
        # the same layers train to the same subnets: selectors that agree share their trainings
        kept = " ".join(",".join(str(layer) for layer in space.depth.kept[depth]) for depth in subject.depths[1:])
        before = results.of(f"layers {kept}/before", lambda: untrained(subject, space, shapes))  # noqa: B023
        after = trained(
            subject, results, OURS, space, shapes, key=f"layers {kept}", seeds=seeds, steps=subject.steps,
            rates=f"4/{OURS.name}",
        )  # fmt: skip
        dense = before[shapes[0]]
        cells = [above([each[shape] for each in losses], dense) for shape in columns for losses in ([before], after)]
        print(row(name, cells), flush=True)


def search(subject: Subject, text: str | None = None, min_depth: int | None = None) -> DepthStrategy:
    """Choose layers on one text as the demo's recipe does."""
    return choose_layers(subject, "dynamic_program", text, SearchOptions(exchanges=1), min_depth)


def choose_layers(
    subject: Subject, selector: str = "dynamic_program", text: str | None = None,
    options: SearchOptions | None = None, min_depth: int | None = None,
) -> DepthStrategy:  # fmt: skip
    """Choose layers by a selector's name."""
    model = subject.model()
    calibration = subject.calibrations[text or subject.own_text]
    task = DepthTask(
        model, architecture_for(model.config.model_type), objective_named("loss"), calibration,
        min_depth=min_depth or subject.depths[-1], options=options or SearchOptions(),
    )  # fmt: skip
    return depth_selector_named(selector).select(task)


def choose_channels(
    subject: Subject, importance: str = "flap", widths: Sequence[Fraction] | None = None,
    allocation: Allocation | None = None, bias_compensation: bool = False,
) -> WidthStrategy:  # fmt: skip
    """Rank units on the subject's own text, and decide how many of them each width keeps."""
    model, calibration = subject.model(), subject.calibrations[subject.own_text]
    adapter = architecture_for(model.config.model_type)
    scored = importance_named(importance)
    statistics = collect_statistics(model, adapter, calibration)
    gradients = {}
    if isinstance(scored, GroupImportance) and scored.needs_gradients:
        gradients = loss_gradients(model, coupled_parameters(model, adapter), calibration)
    task = WidthTask(
        model, adapter, scored, widths or subject.widths, statistics, gradients, allocation or subject.allocation,
        subject.round_to, bias_compensation=bias_compensation,
    )  # fmt: skip
    if task.allocation == "measured":
        return measured_widths(task, objective_named("loss"), calibration)[0]
    return rank_widths(task)
