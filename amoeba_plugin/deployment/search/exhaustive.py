"""Every choice that may keep the budget is evaluated."""

from __future__ import annotations

from amoeba_plugin.deployment.search.problem import Choice, Problem, best_kept


def exhaustive(problem: Problem) -> Choice:
    """Return the best choice within the budget.

    Raises:
        BudgetError: If there is none.
    """
    possible = problem.possible()
    for choice in possible:
        problem.loss(choice)
    return best_kept(problem, possible)
