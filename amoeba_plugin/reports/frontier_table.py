"""What a search found, in the terminal."""

from __future__ import annotations

from rich.table import Table

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.frontier import Frontier


def table_of(found: Frontier) -> Table:
    """Return every shape that was evaluated, the best first; in bold the one that was chosen."""
    budget = Budget.parse(found.budget)
    columns = [f"{limit.name} {limit.unit[0]}" for limit in budget.limits]
    table = Table("shape", "loss", *columns, "keeps the budget", title=f"within {found.budget}", title_justify="left")
    for each in found.candidates:
        cells = []
        for limit in budget.limits:
            cost, (_, unit) = each.costs[limit.name], limit.unit
            cells.append(str(Prediction(cost.value / unit, cost.low / unit, cost.high / unit, cost.measured)))
        note = "yes" if each.keeps else "no"
        style = "bold green" if each.shape == found.chosen else "dim" if each.dominated or not each.keeps else ""
        table.add_row(each.shape, f"{each.loss:.3f}", *cells, note, style=style)
    return table
