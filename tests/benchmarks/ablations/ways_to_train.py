"""The paper's Table 4, ways to train subnets of 3 depths x 3 widths; and ways that the paper does not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from results import Losses, Results, above, header, row
from subjects import Subject

from selection import OURS, choose_channels, search
from training import FACTORS, ONE_FOR_ALL, ONE_LORA, STUDENTS, Space, Variant, trained, untrained

EXPERTS = ONE_FOR_ALL["num_experts"]
RANDOM_START = ONE_FOR_ALL | {"router_init": "random"}
ONE_TRAINING = (
    OURS,
    Variant("one-for-all, SMOL (outputs)", adapter=ONE_FOR_ALL | {"combination": "outputs"}),
    Variant("one-for-all, SMOL, random start", adapter=RANDOM_START),
    Variant("one-for-all, SMOL as published", adapter={"num_experts": 5, "top_k": 2} | FACTORS),
    Variant("one-for-all, LoRA of rank r", adapter=ONE_LORA),
    Variant("one-for-all, LoRA of rank 3r", adapter=ONE_LORA, rank_factor=EXPERTS),
    Variant("one-for-all, no balancing", options={"loss_balancing": False}),
    Variant("one-for-all, no distillation", options={"kd_weight": 0.0}),
    Variant("one-for-all, largest trained too", options={"train_largest": True}),
)
OUTPUTS = RANDOM_START | {"combination": "outputs"}
ALL = {"sampled_shapes": "all"}
BEYOND = (
    Variant("every shape drawn", options=ALL),
    Variant("four random shapes in a step", students=5),
    Variant("SMOL (outputs), random start", adapter=OUTPUTS),
    Variant("SMOL (outputs), random start, every shape drawn", adapter=OUTPUTS, options=ALL),
    Variant("LoRA of rank 3r, every shape drawn", adapter=ONE_LORA, rank_factor=EXPERTS, options=ALL),
    Variant("SMOL (factors) of rank 3r", rank_factor=EXPERTS),
    Variant("Kullback-Leibler", options={"loss": "kl"}),
    Variant("half distillation, half labels", options={"kd_weight": 0.5}),
    Variant("one random shape in a step", students=2),
    Variant("random start, balanced load", adapter=RANDOM_START | {"router_load_balancing": 0.01}),
    Variant("six experts at the widths", adapter=ONE_FOR_ALL | {"num_experts": 6}),
)
ALONE = Variant("alone", adapter=ONE_LORA, students=1)


@dataclass(frozen=True)
class Prepared:
    """What all rows of a table have in common; ``before`` are the losses before training, the whole model's first."""

    subject: Subject
    results: Results
    seeds: Sequence[int]
    space: Space
    before: Losses

    @property
    def shapes(self) -> list[str]:
        """The subnets, without the whole model."""
        return [*self.before][1:]

    def print_row(self, name: str, of_seeds: Sequence[Losses]) -> None:
        """Print the losses above the dense model's, of every shape and of the mean shape."""
        dense = next(iter(self.before.values()))
        means = [sum(losses[shape] for shape in self.shapes) / len(self.shapes) for losses in of_seeds]
        cells = [above([losses[shape] for losses in of_seeds], dense) for shape in self.shapes]
        print(row(name, [*cells, above(means, dense)]), flush=True)

    def one_training(self, variant: Variant, key: str) -> list[Losses]:
        """Train all shapes together; one adapter has one learning rate, whatever else varies."""
        same = next(each for each in (*ONE_TRAINING, *BEYOND) if each.capacity == variant.capacity)
        return trained(
            self.subject, self.results, variant, self.space, [*self.before], key=key, seeds=self.seeds,
            steps=self.subject.steps, rates=f"{'4' if same in ONE_TRAINING else 'beyond'}/{same.name}",
        )  # fmt: skip

    def alone(self, key: str, rates: str, steps: int) -> list[Losses]:
        """Train every shape by itself, at the learning rates found for the training of another key."""
        of_shapes = [  # by shape, then by seed
            trained(
                self.subject, self.results, ALONE, self.space.of_one(shape), [shape], key=f"{key}/{shape}",
                seeds=self.seeds, steps=steps, rates=f"{rates}/{shape}",
            )
            for shape in self.shapes
        ]  # fmt: skip
        of_seeds = zip(*of_shapes, strict=True)
        return [{shape: losses[shape] for shape, losses in zip(self.shapes, each, strict=True)} for each in of_seeds]


def table_4(subject: Subject, results: Results, seeds: Sequence[int], wanted: Sequence[str] | None = None) -> None:
    """Print the paper's ways; ``wanted`` are parts of the names of rows."""
    table = _prepare("Ways to train", subject, results, seeds)
    for variant in ONE_TRAINING:
        if _wanted(variant.name, wanted):
            table.print_row(variant.name, table.one_training(variant, f"4/{variant.name}"))
    if _wanted("each shape alone", wanted):
        passes = STUDENTS * subject.steps
        shared, each = "each shape alone, same passes in all", "each shape alone, same passes each"
        table.print_row(shared, table.alone(f"4/{shared}", f"4/{shared}", passes // len(table.shapes)))
        # at the rates of the row above: trials of its own would take longer than the whole table
        table.print_row(each, table.alone(f"4/{each}", f"4/{shared}", passes))


def table_beyond(subject: Subject, results: Results, seeds: Sequence[int], wanted: Sequence[str] | None = None) -> None:
    """Print ways that the paper does not have; ``wanted`` are parts of the names of rows."""
    table = _prepare("Beyond the paper", subject, results, seeds)
    table.print_row(OURS.name, table.one_training(OURS, f"4/{OURS.name}"))
    for variant in BEYOND:
        if _wanted(variant.name, wanted):
            table.print_row(variant.name, table.one_training(variant, f"beyond/{variant.name}"))


def _prepare(title: str, subject: Subject, results: Results, seeds: Sequence[int]) -> Prepared:
    shapes = [f"{depth}x{width}" for depth in subject.depths for width in subject.widths[:3]]
    space = Space(search(subject), choose_channels(subject), subject.depths, subject.widths[:3])
    table = Prepared(subject, results, seeds, space, results.of("4/before", lambda: untrained(subject, space, shapes)))
    print(header(f"{title} ({subject.path.name}, {subject.steps} steps)", "training", [*table.shapes, "mean"]))
    table.print_row("none", [table.before])
    return table


def _wanted(name: str, wanted: Sequence[str] | None) -> bool:
    return not wanted or any(part in name for part in wanted)
