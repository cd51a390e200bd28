"""What one-for-all training does beside what TrainingArguments say: loss, balancing, sampling; values are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from amoeba_plugin.errors import RecipeError, ShapeError
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.training.one_for_all.losses import DIVERGENCES


@dataclass(frozen=True)
class OneForAllOptions:
    """What one-for-all training does beside what ``TrainingArguments`` say.

    Args:
        loss: What subnets learn from the largest: "soft_cross_entropy" (the paper), "kl", "reverse_kl" or
            "jensen_shannon".
        temperature: T divides both logits. As in the reference code, losses are not multiplied by T^2 (Hinton et al.,
            arXiv:1503.02531, section 2): gradients shrink by about T^2, and only against the labels (``kd_weight``
            below 1) or without ``loss_balancing``, which divides by the loss, would the factor be seen.
        kd_weight: Share of distillation in a subnet's loss, in [0, 1]; the rest is next-token cross-entropy.
        loss_balancing: Scale each subnet's loss to the size of the largest subnet's.
        max_balance_ratio: The largest scale; reached where a divergence goes to 0.
        distill_all_tokens: Distil every position, not just those before a target token.
        distill_steps: Optimizer steps with distillation; after them all subnets learn from the labels alone. None: all.
        num_random: Random shapes per micro-batch, beside largest and smallest.
        sampled_shapes: Shapes that the random ones are drawn from, depth and width together: ``("24x7/8", ...)``, or
            "all": every shape between largest and smallest. "independent": depth and width are drawn apart, the depth
            from all but the largest (the reference code): narrow subnets of all layers are never trained.
        train_largest: False: the largest subnet only teaches; it gets no backward pass. For an adapter that leaves the
            whole model alone (``SmolConfig.adapt_largest=False``).
        conflict_every: Optimizer steps between two measurements of gradient conflict, the cosines between the subnets'
            gradients; each holds one more copy of the gradients per subnet. 0: never.

    Raises:
        RecipeError: If a value is out of range.
    """

    loss: str = "soft_cross_entropy"
    temperature: float = 1.0
    kd_weight: float = 1.0
    loss_balancing: bool = True
    max_balance_ratio: float = 10.0
    distill_all_tokens: bool = False
    distill_steps: int | None = None
    num_random: int = 2
    sampled_shapes: tuple[str, ...] | Literal["all", "independent"] = "all"
    train_largest: bool = True
    conflict_every: int = 0

    def __post_init__(self) -> None:
        if self.loss not in DIVERGENCES:
            raise RecipeError(f"loss '{self.loss}' is unknown; choose one of {', '.join(DIVERGENCES)}")
        if not 0 < self.temperature < math.inf:
            raise RecipeError(
                f"temperature {self.temperature}: it divides logits, give a number above 0 (the paper: 1)"
            )
        if not 0 <= self.kd_weight <= 1:
            raise RecipeError(f"kd_weight {self.kd_weight}: give a share in [0, 1] (the paper: 1)")
        if not self.max_balance_ratio > 0:
            raise RecipeError(f"max_balance_ratio {self.max_balance_ratio}: give a number above 0")
        self._check_sampling()
        if self.distill_steps is not None and self.distill_steps < 0:
            raise RecipeError(f"distill_steps {self.distill_steps}: give 0 or more optimizer steps, or leave it out")
        if self.conflict_every < 0:
            raise RecipeError(f"conflict_every {self.conflict_every}: give optimizer steps, or 0 for never")

    def _check_sampling(self) -> None:
        if self.num_random < 0:
            raise RecipeError(f"num_random {self.num_random}: give 0 or more (the paper: 2)")
        if isinstance(self.sampled_shapes, str):
            if self.sampled_shapes in ("all", "independent"):
                return
            raise RecipeError(f"sampled_shapes '{self.sampled_shapes}': give a list of shapes, all, or independent")
        if not self.sampled_shapes:
            raise RecipeError("sampled_shapes is empty: give a list of shapes, all, or independent")
        try:
            for shape in self.sampled_shapes:
                SubnetShape.parse(shape)
        except ShapeError as error:
            raise RecipeError(f"sampled_shapes: {error}") from error

    def kd_weight_at(self, step: int) -> float:
        """Return the share of distillation at an optimizer step."""
        return self.kd_weight if self.distill_steps is None or step < self.distill_steps else 0.0
