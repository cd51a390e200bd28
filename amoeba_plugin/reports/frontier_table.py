"""What a search found, in the terminal: a table, and what its intervals say."""

from __future__ import annotations

from rich.table import Table

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.frontier import Frontier, Interval


def table_of(found: Frontier) -> Table:
    """Return every shape that was evaluated, the best first; in bold the one that was chosen."""
    budget = Budget.parse(found.budget)
    columns = [f"{limit.name} {limit.unit[0]}" for limit in budget.limits]
    table = Table(
        "shape", found.evaluator, *columns, "keeps the budget", title=f"within {found.budget}", title_justify="left"
    )
    for each in found.candidates:
        cells = []
        for limit in budget.limits:
            cost, (_, unit) = each.costs[limit.name], limit.unit
            cells.append(str(Prediction(cost.value / unit, cost.low / unit, cost.high / unit, cost.measured)))
        note = "yes" if each.keeps else "no"
        style = "bold green" if each.shape == found.chosen else "dim" if each.dominated or not each.keeps else ""
        table.add_row(each.shape, f"{each.quality.value:.3f} ±{_half(each.quality):.2g}", *cells, note, style=style)
    return table


def notes_on(found: Frontier) -> list[str]:
    """Return what intervals say of the choice, in sentences."""
    best, second = next(each for each in found.candidates if each.shape == found.chosen), found.runner_up
    told = [f"{found.chosen}: {best.quality} {found.unit}"]
    if second is not None and second.is_told_apart:
        told.append(f"the second best, {second.shape}, is worse by {second.behind}")
    elif second is not None:
        told.append(
            f"the second best, {second.shape}, cannot be told apart from it: it is worse by {second.behind}, judged on "
            "the same; --num-samples takes more"
        )
    return told


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2
