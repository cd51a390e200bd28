"""A micro-batch on its way through all subnets, and by what its losses weigh in the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from amoeba_plugin.training.next_token import Positions


class Share(NamedTuple):
    """A micro-batch's part of an optimizer step, by which its mean losses weigh."""

    targets: Tensor | float  # of the step's target tokens
    distilled: Tensor | float  # of the positions that the step distils

    @classmethod
    def even(cls, share: Tensor | float) -> Share:
        """Return the same part of both, as where the positions that are distilled are those before a target."""
        return cls(share, share)

    @property
    def targets_per_distilled(self) -> Tensor | float:
        """What the labels' part of a distilled loss is multiplied with, which then weighs by ``distilled``."""
        return 1.0 if self.targets is self.distilled else self.targets / self.distilled


@dataclass(frozen=True)
class MicroBatch:
    """What every subnet of a step is run on.

    Attributes:
        model: The model as wrapped for training.
        inputs: Without labels: ``input_ids`` (batch, length) int64, perhaps an ``attention_mask``.
        positions: Where it has losses.
        place: Optimizer steps done so far, and micro-batches of the current one.
        share: Its part of the optimizer step: the weight of its mean losses.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    positions: Positions
    place: tuple[int, int]
    share: Share

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self.place[0]
