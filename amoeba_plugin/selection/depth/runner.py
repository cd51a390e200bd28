"""What runs subnets that lack layers: the contract that ``Lockstep`` and ``OneByOne`` keep, and which of them it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.ranks import agreed
from amoeba_plugin.selection.depth.lockstep import Lockstep
from amoeba_plugin.selection.depth.lockstep_contract import Contract, check_contract
from amoeba_plugin.selection.depth.one_by_one import OneByOne
from amoeba_plugin.selection.depth.steps import Removed
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.objectives import Objective, Score

logger = logging.getLogger(__name__)
GIB = 2**30


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


@contextmanager
def runner_for(task: DepthTask, mine: Sequence[Batch], candidates: int) -> Iterator[Runner]:
    """Yield what runs subnets: in lockstep where decoder and objective allow it on every rank, else one by one.

    Args:
        task: Its model is restored with the block.
        mine: The batches that this rank observes, from ``share_of``; may be none.
        candidates: Steps that may go: indices 0 to this - 1.

    Raises:
        ArchitectureError: If the adapter does not know the sublayers asked for.
    """
    model, adapter, objective = task.model, task.adapter, task.objective
    stand_ins = _stand_ins(task)
    contract = Contract(f"objective {objective.name} measures it as a whole")
    if objective.is_separable:
        contract = check_contract(model, adapter, task.batches, stand_ins)
    if agreed(contract.broken is None):
        with Lockstep.of(
            model, adapter, mine, candidates, task.options.cache_gib * GIB,
            returns_tuples=contract.returns_tuples, stand_ins=stand_ins, folds=task.folds,
        ) as lockstep:  # fmt: skip
            yield lockstep
    else:
        logger.warning(
            "every subnet of this %s is run from its embeddings, which takes several times as long: %s",
            type(model).__name__, contract.broken or "another rank has to",
        )  # fmt: skip
        with OneByOne.of(model, adapter, mine, stand_ins) as one_by_one:
            yield one_by_one


def _stand_ins(task: DepthTask) -> StandIns | None:
    if task.options.granularity == "layer":
        return None
    return StandIns(task.adapter.sublayers(task.model.config), tuple(task.adapter.layers(task.model)))
