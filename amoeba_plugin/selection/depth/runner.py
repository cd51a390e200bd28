"""What runs subnets for the search over depths: the contract that ``Lockstep`` and ``OneByOne`` keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from amoeba_plugin.selection.depth.steps import Removed
from amoeba_plugin.selection.objectives import Objective, Score


class Runner(Protocol):
    """Runs a model without each of some sets of steps, on the batches of this rank."""

    def observe(self, objective: Objective, sets: Sequence[Removed], progress: Callable[[], object]) -> list[Tensor]:
        """Return what an objective observes on this rank.

        Args:
            objective: One made of observations (``Objective.is_separable``).
            sets: Steps removed, different from one another; the empty set is the whole model.
            progress: Called for every set and batch.

        Returns:
            For each set (rows, columns) fp64 on the CPU, the rows of all batches in order.
        """

    def measure(self, objective: Objective, sets: Sequence[Removed], progress: Callable[[], object]) -> list[Score]:
        """Return the score of each set on the batches of all ranks, the same on every rank; arguments as above."""

    def report(self) -> dict[str, Any]:
        """Return what was run in this process: ``lockstep``, ``layer_forwards`` and, in bytes, ``peak_bytes``."""
