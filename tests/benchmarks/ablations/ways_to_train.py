"""The paper's Table 4: ways to train subnets of 3 depths x 3 widths."""

from __future__ import annotations

from collections.abc import Sequence

from results import Losses, Results, above, header, row
from selection import OURS, choose_channels, search
from subjects import Subject
from training import ONE_FOR_ALL, ONE_LORA, STUDENTS, Space, Variant, trained, untrained

EXPERTS = ONE_FOR_ALL["num_experts"]
ONE_TRAINING = (
    OURS,
    Variant("one-for-all, SMOL (outputs)", adapter=ONE_FOR_ALL | {"combination": "outputs"}),
    Variant("one-for-all, SMOL, random start", adapter=ONE_FOR_ALL | {"router_init": "random"}),
    Variant("one-for-all, SMOL as published", adapter={"num_experts": 5, "top_k": 2}),
    Variant("one-for-all, LoRA of rank r", adapter=ONE_LORA),
    Variant("one-for-all, LoRA of rank 3r", adapter=ONE_LORA, rank_factor=EXPERTS),
    Variant("one-for-all, no balancing", options={"loss_balancing": False}),
    Variant("one-for-all, no distillation", options={"kd_weight": 0.0}),
    Variant("one-for-all, largest trained too", options={"train_largest": True}),
)
ALONE = Variant("alone", adapter=ONE_LORA, students=1)


def table_4(subject: Subject, results: Results, seeds: Sequence[int], wanted: Sequence[str] | None = None) -> None:
    """Print the table; ``wanted`` are parts of the names of rows."""
    shapes = [f"{depth}x{width}" for depth in subject.depths for width in subject.widths[:3]]
    space = Space(search(subject), choose_channels(subject), subject.depths, subject.widths[:3])
    before = results.of("4/before", lambda: untrained(subject, space, shapes))
    dense = before[shapes[0]]
    print(header(f"Ways to train ({subject.path.name}, {subject.steps} steps)", "training", [*shapes[1:], "mean"]))

    def line(name: str, losses: Sequence[Losses]) -> None:
        means = [sum(each[shape] for shape in shapes[1:]) / len(shapes[1:]) for each in losses]
        cells = [above([each[shape] for each in losses], dense) for shape in shapes[1:]]
        print(row(name, [*cells, above(means, dense)]), flush=True)

    line("none", [before])
    for variant in ONE_TRAINING:
        if _wanted(variant.name, wanted):
            key = f"4/{variant.name}"
            line(
                variant.name,
                trained(subject, results, variant, space, shapes, key=key, seeds=seeds, steps=subject.steps),
            )
    if _wanted("each shape alone", wanted):
        passes = STUDENTS * subject.steps
        shared = "4/each shape alone, same passes in all"
        losses = _alone(subject, results, space, shapes[1:], shared, seeds, passes // len(shapes[1:]), shared)
        line(shared.removeprefix("4/"), losses)
        # at the learning rates found above: three trials of every shape would take longer than all else
        each = "4/each shape alone, same passes each"
        line(each.removeprefix("4/"), _alone(subject, results, space, shapes[1:], each, seeds, passes, shared))


def _wanted(name: str, wanted: Sequence[str] | None) -> bool:
    return not wanted or any(part in name for part in wanted)


def _alone(
    subject: Subject, results: Results, space: Space, shapes: Sequence[str], key: str, seeds: Sequence[int], steps: int,
    rates: str,
) -> list[Losses]:  # fmt: skip
    of_shapes = [  # by shape, then by seed
        trained(
            subject, results, ALONE, space.of_one(shape), [shape], key=f"{key}/{shape}", seeds=seeds, steps=steps,
            rates=f"{rates}/{shape}",
        )
        for shape in shapes
    ]  # fmt: skip
    of_seeds = zip(*of_shapes, strict=True)
    return [{shape: losses[shape] for shape, losses in zip(shapes, each, strict=True)} for each in of_seeds]
