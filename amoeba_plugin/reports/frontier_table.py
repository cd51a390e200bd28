"""What a search found as a table, and what its intervals say in sentences."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.frontier import Frontier, Interval

SHOWN = 40  # rows: a space of a hundred shapes at three schemes fills many screens, and the file has them all


@dataclass(frozen=True)
class Line:
    """A choice as it is shown.

    Attributes:
        cells: Its figures, one for every heading.
        is_chosen: Whether it was.
        is_behind: Whether it breaks the budget, or another one is better and costs no more.
    """

    cells: list[str]
    is_chosen: bool
    is_behind: bool


def headings_of(found: Frontier) -> list[str]:
    """Return what is told of every choice."""
    budget = Budget.parse(found.budget)
    place = [_place(budget)] if _place(budget) else []
    costs = [f"{limit.name} {limit.unit[0]}" for limit in budget.limits]
    return ["shape", *place, found.evaluator, "worse by", *costs, "keeps"]


def lines_of(found: Frontier) -> list[Line]:
    """Return the choices whose shapes were evaluated, the best first, as far as they are shown."""
    budget, lines = Budget.parse(found.budget), []
    for each in found.candidates[:SHOWN]:
        place = {"": [], "scheme": [each.flow.partition(":")[2]], "flow": [each.flow]}[_place(budget)]
        quality = f"{each.quality.value:.3f}{'' if each.harm is None else ' *'}"
        behind = "" if each == found.best else f"{each.behind.value:.3f} ±{_half(each.behind):.2g}"
        cells = [each.shape, *place, quality, behind]
        for limit in budget.limits:
            cost, (_, unit) = each.costs[limit.name], limit.unit
            cells.append(str(Prediction(cost.value / unit, cost.low / unit, cost.high / unit, cost.measured)))
        cells.append("yes" if each.keeps else "no")
        lines.append(Line(cells, each == found.best, each.dominated or not each.keeps))
    return lines


def _place(budget: Budget) -> str:
    """Return what of a point tells choices apart, beside their shape."""
    if len(budget.points) == 1:
        return ""
    return "scheme" if len({point.flow for point in budget.points}) == 1 else "flow"


def table_of(found: Frontier) -> Table:
    """Return the choices as a table, in bold what was chosen."""
    table = Table(*headings_of(found), title=f"within {found.budget}", title_justify="left")
    for line in lines_of(found):
        table.add_row(*line.cells, style="bold green" if line.is_chosen else "dim" if line.is_behind else "")
    return table


def notes_on(found: Frontier) -> list[str]:
    """Return what intervals say of the choice, in sentences."""
    best, second = found.best, found.runner_up
    told = [f"{best.shape} at {best.flow}: {best.quality} {found.unit}"]
    if len(found.candidates) > SHOWN:
        told.append(f"{len(found.candidates) - SHOWN} more choices, which are worse, are in the file")
    if found.finalists:
        told.append(f"* measured in the engine; there the scheme adds {best.harm} to the choice" if best.harm else
                    f"* measured in the engine: {found.finalists}")  # fmt: skip
    if found.open:
        told.append(
            f"{found.open} more could be better if their scheme did them no harm; --finalists measures more of them"
        )
    if second is not None and second.is_surely_worse:
        told.append(f"the second best, {second.shape} at {second.flow}, is worse by {second.behind}")
    elif second is not None:
        told.append(
            f"the second best, {second.shape} at {second.flow}, cannot be told apart from it: it is worse by "
            f"{second.behind}, judged on the same; --num-samples takes more"
        )
    return told


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2
