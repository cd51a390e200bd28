"""Searches that are watched: which shapes they judge, one after the other, also in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

from amoeba_plugin.deployment.search.nsga2 import nsga2
from amoeba_plugin.deployment.search.problem import Problem
from amoeba_plugin.deployment.search.quality import Quality
from amoeba_plugin.shape import SubnetShape
from support.landscapes import landscape


def watched(problem: Problem, dies_after: int | None = None, seconds: float = 0.0) -> list[SubnetShape]:
    """Return a list to which every shape is added that the problem judges from now on.

    Args:
        problem: That is watched.
        dies_after: So many; then it is as if the user stopped it.
        seconds: That judging takes.
    """
    seen: list[SubnetShape] = []
    judge = problem.evaluate

    def evaluate(shape: SubnetShape) -> Quality:
        if dies_after is not None and len(seen) == dies_after:
            raise KeyboardInterrupt
        seen.append(shape)
        time.sleep(seconds)
        return judge(shape)

    problem.evaluate = evaluate
    return seen


def search_in_steps(told: tuple[int, str, int]) -> list[str]:
    """Search in trials that a file shares with other processes, and return the shapes that this one judged."""
    seed, storage, trials = told
    problem, _ = landscape(seed)
    problem.storage, problem.trials = Path(storage), trials
    seen = watched(problem, seconds=0.05)
    nsga2(problem)
    return [str(shape) for shape in seen]
