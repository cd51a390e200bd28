"""Every shape that may keep the budget is evaluated."""

from __future__ import annotations

from amoeba_plugin.deployment.search.problem import Problem, best_kept
from amoeba_plugin.shape import SubnetShape


def exhaustive(problem: Problem) -> SubnetShape:
    """Return the best shape within the budget.

    Raises:
        BudgetError: If there is none.
    """
    possible = problem.possible()
    for shape in possible:
        problem.loss(shape)
    return best_kept(problem, possible)
