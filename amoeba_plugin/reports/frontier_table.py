"""What a search found, in the terminal: a table, and what its intervals say."""

from __future__ import annotations

from rich.table import Table

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.frontier import Frontier, Interval

SHOWN = 40  # rows: a space of a hundred shapes at three schemes fills many screens, and the file has them all


def table_of(found: Frontier) -> Table:
    """Return the choices whose shapes were evaluated, the best first; in bold what was chosen."""
    budget = Budget.parse(found.budget)
    several, alike = len(budget.points) > 1, len({point.flow for point in budget.points}) == 1
    heads = ["shape", *(["scheme" if alike else "flow"] if several else []), found.evaluator, "worse by"]
    columns = [f"{limit.name} {limit.unit[0]}" for limit in budget.limits]
    table = Table(*heads, *columns, "keeps", title=f"within {found.budget}", title_justify="left")
    for each in found.candidates[:SHOWN]:
        place = [each.shape, *([each.flow.partition(":")[2] if alike else each.flow] if several else [])]
        quality = f"{each.quality.value:.3f}{'' if each.harm is None else ' *'}"
        behind = "" if each == found.best else f"{each.behind.value:.3f} ±{_half(each.behind):.2g}"
        cells = [*place, quality, behind]
        for limit in budget.limits:
            cost, (_, unit) = each.costs[limit.name], limit.unit
            cells.append(str(Prediction(cost.value / unit, cost.low / unit, cost.high / unit, cost.measured)))
        style = "bold green" if each == found.best else "dim" if each.dominated or not each.keeps else ""
        table.add_row(*cells, "yes" if each.keeps else "no", style=style)
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
