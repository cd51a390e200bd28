"""The paper's Table 1: published ways to prune, each tuned by itself, against subnets of one training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from results import Losses, Results, above, header, row
from subjects import Subject

from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.width.ranking import unit_cost
from amoeba_plugin.shape import SubnetShape
from selection import OURS, choose_channels, choose_layers, search
from training import ONE_LORA, Space, Variant, evaluated, on_validation, trained, untrained

TUNED = (
    Variant("tuned on labels", adapter=ONE_LORA, options={"kd_weight": 0.0, "loss_balancing": False}, students=1),
    Variant("tuned by distillation", adapter=ONE_LORA, students=1),
)
EVERY_SHAPE = Variant("every shape drawn", options={"sampled_shapes": "all"})
WHOLE = Fraction(1)


@dataclass(frozen=True)
class Method:
    """A published way to prune, and the shape it keeps at each share of the block parameters."""

    name: str
    space: Space
    shapes: Mapping[Fraction, str]


def table_1(subject: Subject, results: Results, seeds: Sequence[int], _: Sequence[str] | None = None) -> None:
    """Print held-out losses at three shares of the block parameters: those that three depths keep exactly.

    Every training, of one shape or of all, sees the same tokens. One training for all has in each column the shape of
    at most that share that does best on the validation text; its row says how widths are allocated.
    """
    if not subject.budgets:
        print(f"\nNo Table 1 for {subject.path.name}: too few layers.")
        return
    layers = subject.depths[0]
    shares = [Fraction(depth, layers) for depth in subject.budgets]
    columns = [f"{float(share):.0%}" for share in shares]
    print(header(f"One training against published pruning ({subject.path.name})", "method", columns))
    largest = f"{layers}x1"
    spaces = {name: _space(subject, widths) for name, widths in _allocations(subject).items()}
    dense = results.of("1/dense", lambda: untrained(subject, next(iter(spaces.values())), [largest]))[largest]
    for method in _methods(subject, shares):
        _print_method(subject, results, method, seeds, dense)
    for name, space in spaces.items():
        fitting = {share: [*_fitting(subject, space, share)] for share in shares}
        candidates = list(dict.fromkeys(shape for shapes in fitting.values() for shape in shapes))
        key = f"1/ours, {name}"
        before = results.of(f"{key}/before", lambda: evaluated(subject, space.elastic(subject), candidates))  # noqa: B023
        _print_best(f"one training for all, {name}, before", [before], fitting, dense)
        for variant in (OURS, EVERY_SHAPE) if name == "measured" else (OURS,):
            of = key if variant is OURS else f"{key}, {variant.name}"
            of_seeds = trained(subject, results, variant, space, candidates, key=of, seeds=seeds, steps=subject.steps)
            _print_best(f"one training for all{of.removeprefix('1/ours')}", of_seeds, fitting, dense)


def _allocations(subject: Subject) -> Mapping[str, WidthStrategy]:
    return {
        "uniform": choose_channels(subject, allocation="uniform"),
        "measured": choose_channels(subject, allocation="measured"),
        "global, with biases": choose_channels(subject, allocation="global", bias_compensation=True),
    }


def _space(subject: Subject, widths: WidthStrategy) -> Space:
    depths = range(min(subject.budgets), subject.depths[0] + 1)
    return Space(search(subject, min_depth=min(depths)), widths, depths, subject.widths)


def _methods(subject: Subject, shares: Sequence[Fraction]) -> Iterator[Method]:
    layers = subject.depths[0]
    widths = (WHOLE, *shares)
    all_layers = search(subject)
    by_width = {share: f"{layers}x{share}" for share in shares}
    flap = choose_channels(subject, "flap", widths, "global", bias_compensation=True)
    yield Method("FLAP: channels", Space(all_layers, flap, (layers,), widths), by_width)
    taylor = choose_channels(subject, "taylor", widths, "uniform")
    yield Method("Taylor: channels", Space(all_layers, taylor, (layers,), widths), by_width)
    depth = choose_layers(subject, "taylor_plus", min_depth=min(subject.budgets))
    by_depth = {share: f"{int(share * layers)}x1" for share in shares}
    yield Method("Taylor+: layers", Space(depth, taylor, (layers, *subject.budgets), (WHOLE,)), by_depth)


def _print_method(subject: Subject, results: Results, method: Method, seeds: Sequence[int], dense: float) -> None:
    sizes = [share_kept(subject, method.space, shape) for shape in method.shapes.values()]
    before = [
        results.of(f"1/{method.name}/{shape}/before", lambda: untrained(subject, method.space.of_one(shape), [shape]))  # noqa: B023
        for shape in method.shapes.values()
    ]
    kept = ", ".join(f"{float(size):.0%}" for size in sizes)
    cells = [above([losses[shape]], dense) for losses, shape in zip(before, method.shapes.values(), strict=True)]
    print(row(f"{method.name} ({kept} kept)", cells))
    for variant in TUNED:
        key = f"1/{method.name}/{variant.name}"

        def tune(shape: str, seeds: Sequence[int], key: str = key, variant: Variant = variant) -> list[float]:
            losses = trained(
                subject, results, variant, method.space.of_one(shape), [shape], key=f"{key}/{shape}", seeds=seeds,
                steps=subject.steps, rates=key,
            )  # fmt: skip
            return [each[shape] for each in losses]

        tune([*method.shapes.values()][1], seeds=())  # the learning rate of all three sizes
        print(row(f"{method.name}, {variant.name}", [above(tune(s, seeds), dense) for s in method.shapes.values()]))


def _fitting(subject: Subject, space: Space, share: Fraction) -> Iterator[str]:
    """Yield the shapes that keep a share of the block parameters, or up to a tenth of the model less."""
    for depth in space.depths:
        for width in space.widths:
            shape = f"{depth}x{width}"
            if share - Fraction(1, 10) < share_kept(subject, space, shape) <= share:
                yield shape


def share_kept(subject: Subject, space: Space, shape: str) -> Fraction:
    """Return the share of the weights of heads and neurons that a shape keeps."""
    model, parsed = subject.model(), SubnetShape.parse(shape)
    adapter = architecture_for(model.config.model_type)
    kept = total = 0
    for index, layer in enumerate(adapter.layers(model)):
        for group in adapter.channel_groups(model.config):
            cost, key = unit_cost(layer, group), group_key(index, group)
            total += cost * group.units
            if index in space.depth.kept[parsed.depth]:
                kept += cost * space.width.units[parsed.width].get(key, group.units)
    return Fraction(kept, total)


def _print_best(name: str, of_seeds: Sequence[Losses], fitting: Mapping[Fraction, list[str]], dense: float) -> None:
    print(row(name, [_best(of_seeds, shapes, dense) for shapes in fitting.values()]), flush=True)


def _best(of_seeds: Sequence[Losses], shapes: Sequence[str], dense: float) -> str:
    chosen = [min(shapes, key=lambda shape: losses[on_validation(shape)]) for losses in of_seeds]
    values = [losses[shape] for losses, shape in zip(of_seeds, chosen, strict=True)]
    return f"{above(values, dense)} ({', '.join(dict.fromkeys(chosen))})"
