"""What a run of a recipe needs of this machine: memory and disk, by the recipe and the model's configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.recipes.budgeted import budget_subject
from amoeba_plugin.recipes.disk import DiskNeed, NumberSizes, recipe_disk
from amoeba_plugin.recipes.memory import MemoryNeed, memory_need
from amoeba_plugin.recipes.model_plan import ModelPlan
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.recipes.weights import Weights
from amoeba_plugin.shape import SubnetShape


@dataclass(frozen=True)
class Needs:
    """What a run needs at most.

    Attributes:
        memory: Of the process.
        disk: Of disks.
        weights: What it was told by.
        subnet: Weights of the largest subnet that may be cut.
        sizes: Of numbers.
    """

    memory: MemoryNeed
    disk: DiskNeed
    weights: Weights
    subnet: int
    sizes: NumberSizes

    @property
    def in_words(self) -> list[str]:
        """A sentence each."""
        return [self.memory.in_words, self.disk.in_words]


def recipe_needs(
    plan: RecipePlan, model_plan: ModelPlan, samples: int, length: int, subject: Subject | None = None,
    possible: Iterable[SubnetShape] = (),
) -> Needs | None:  # fmt: skip
    """Return what a run needs; ``None`` for a recipe that only quantizes.

    Args:
        plan: Of the recipe.
        model_plan: The same, against the model's configuration.
        samples: Sequences of calibration data.
        length: Tokens of each.
        subject: What is profiled for the recipe's budget before; ``None``: nothing is.
        possible: Shapes of which one will be cut; none: as the recipe says, at most the whole model.
    """
    if model_plan.adapter is None or not (plan.structural or plan.tuning):
        return None
    weights, sizes = Weights(plan, model_plan.config, model_plan.adapter), NumberSizes.of(model_plan.config)
    cut = list(possible) or ([] if plan.shape is None else [plan.shape])
    round_to = 1 if plan.width is None else plan.width.round_to
    subnet = max(weights.of_shapes(cut, round_to).values(), default=weights.whole)
    memory = memory_need(weights, samples, length, sizes.computed, subnet)
    return Needs(memory, recipe_disk(weights, samples, length, sizes, subnet, subject), weights, subnet, sizes)


def needs_in_words(plan: RecipePlan, model_plan: ModelPlan, model: str, samples: int, length: int) -> list[str]:
    """Return what a run needs, with a profile for its budget where none is there; in sentences."""
    profiled = None
    if plan.extraction is not None and plan.extraction.limits is not None:
        known = Path(plan.extraction.how.profile).exists()
        profiled = None if known else budget_subject(plan, model_plan, model)
    needs = recipe_needs(plan, model_plan, samples, length, profiled)
    return [] if needs is None else needs.in_words
