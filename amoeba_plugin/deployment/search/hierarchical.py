"""Few shapes are evaluated: those at the edge of the budget, coarsely first, then around the best.

AmoebaLLM (arXiv:2411.10606) names a hierarchical search and does not describe it. More channels are hardly ever worse
at the same depth, so of every depth the widest shape that keeps the budget is a candidate. Depths are tried at even
distances, which are halved beside the best until they are one. Where the interval of a cost straddles the budget the
shape is measured, which takes less than to evaluate it: what is evaluated keeps the budget.
"""

from __future__ import annotations

from collections.abc import Iterable

from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.search.problem import Choice, Problem, best_kept
from amoeba_plugin.shape import SubnetShape

COARSE = 5  # depths that are tried first


def hierarchical(problem: Problem) -> Choice:
    """Return the best choice found within the budget; each point of it is searched.

    Raises:
        BudgetError: If there is none.
    """
    possible, tried = set(problem.possible()), []
    for point in problem.budget.points:
        edge = _edge(problem, point, possible)
        if edge:
            tried += _inwards(problem, _coarse_then_around(problem, edge), possible)
    return best_kept(problem, tried)


def _edge(problem: Problem, point: Point, possible: set[Choice]) -> list[Choice]:
    """Return the widest shape of every depth that keeps the budget; what must be measured of all depths, together."""
    depths, widths = problem.space.depths, problem.space.widths
    rows = [[Choice(SubnetShape(depth, width), point) for width in widths] for depth in depths]
    left = [[choice for choice in row if choice in possible] for row in rows]
    found: dict[int, Choice] = {}
    while heads := {index: row.pop(0) for index, row in enumerate(left) if row and index not in found}:
        kept = set(problem.kept(list(heads.values())))
        found |= {index: choice for index, choice in heads.items() if choice in kept}
    return [found[index] for index in sorted(found)]


def _coarse_then_around(problem: Problem, edge: list[Choice]) -> list[Choice]:
    """Evaluate some shapes at even distances, and halve the distances beside the best until they are one."""
    count = min(COARSE, len(edge))
    tried = {index * (len(edge) - 1) // max(count - 1, 1) for index in range(count)}
    while True:
        best = min(tried, key=lambda index: problem.loss(edge[index]))
        beside = {(best + other + (other < best)) // 2 for other in _neighbours(tried, best)}  # rounded to the best
        if beside <= tried:
            return [edge[index] for index in sorted(tried)]
        tried |= beside


def _neighbours(tried: Iterable[int], best: int) -> list[int]:
    """Return the next lower and the next higher index that was tried."""
    lower, higher = [each for each in tried if each < best], [each for each in tried if each > best]
    return [*([max(lower)] if lower else []), *([min(higher)] if higher else [])]


def _inwards(problem: Problem, tried: list[Choice], possible: set[Choice]) -> list[Choice]:
    """Evaluate the smaller neighbours of the best as well, as long as one is better: more is not always better."""
    depths, widths, found = problem.space.depths, problem.space.widths, list(tried)
    while True:
        best = min(found, key=problem.loss)
        row, column = depths.index(best.shape.depth), widths.index(best.shape.width)
        places = [(row + 1, column), (row, column + 1)]
        smaller = [SubnetShape(depths[at], widths[to]) for at, to in places if at < len(depths) and to < len(widths)]
        beside = [Choice(shape, best.point) for shape in smaller]
        found += [choice for choice in beside if choice in possible and choice not in found]
        if min(found, key=problem.loss) == best:
            return found
