"""The last round of a search: the best choices are measured in their engine, costs and what the scheme does to them.

A search goes by the elastic model, which no scheme has harmed yet, and a scheme harms one shape more than another. So
choices are measured, the best first, until none that is left could be better even if its scheme did it no harm, or
until so many were measured as were asked for; the result says how many could still be.
"""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_plugin.deployment.budget import Verdict
from amoeba_plugin.deployment.search.problem import Choice, Problem, by_quality


@dataclass(frozen=True)
class Settled:
    """How the last round ended.

    Attributes:
        finalists: Of which all is known, and which keep the budget, the best first.
        open: How many others could be better, if their scheme did them no harm.
        refused: How many exceeded the budget once they were measured.
    """

    finalists: tuple[Choice, ...]
    open: int
    refused: int


def measure_schemes(problem: Problem) -> None:
    """Measure what every scheme of several does to the largest shape that may keep the budget: a search of several has
    to know whether four bits are worth a deeper shape."""
    if len(problem.budget.points) > 1:
        possible = problem.possible()
        for point in problem.budget.points:
            largest = next((choice for choice in possible if choice.point == point), None)
            if largest is not None:
                problem.measure_harm(largest)


def settle(problem: Problem, most: int) -> Settled:
    """Measure the best choices of shapes that were evaluated.

    Args:
        problem: That was searched.
        most: Choices to measure the scheme's harm of; others than those whose harm is known.
    """
    evaluated = [choice for choice in problem.choices() if choice.shape in problem.qualities]
    ordered = by_quality(problem, [each for each in evaluated if problem.verdict(each) is not Verdict.EXCEEDS])
    found: list[Choice] = []
    best, rest, refused, spent = float("inf"), 0, 0, 0
    for place, choice in enumerate(ordered, 1):
        final = problem.is_final(choice)
        least = problem.loss(choice) if final else problem.loss_of(problem.unharmed(choice.shape))
        if found and least >= best:
            continue
        exceeds = problem.verdict(choice) is Verdict.EXCEEDS  # as measured with another
        if found and not final and spent == most and not exceeds:
            rest += 1
        elif not problem.confirm(choice, ordered[place:]):
            refused += problem.measure is not None
        else:
            if not final and spent < most:
                problem.measure_harm(choice)
                spent += 1
            found.append(choice)
            best = min(best, problem.loss(choice))
    return Settled(tuple(by_quality(problem, found)), rest, refused)
