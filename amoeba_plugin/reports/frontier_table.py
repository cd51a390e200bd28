"""What a search found, in the terminal."""

from __future__ import annotations

from rich.table import Table

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.profiling.cost_model import Prediction
from amoeba_plugin.deployment.search.frontier import Frontier

SHOWN = {"prefill": 1e-3, "decode": 1e-3, "load": 1e-3, "memory": 1e6, "file": 1e6}
UNITS = {1e-3: "ms", 1e6: "MB"}


def table_of(found: Frontier) -> Table:
    """Return every shape that was evaluated, the best first; in bold the one that was chosen."""
    budget = Budget.parse(found.budget)
    columns = [f"{limit.name} {UNITS[SHOWN[limit.kind]]}" for limit in budget.limits]
    table = Table("shape", "loss", *columns, "keeps the budget", title=f"within {found.budget}", title_justify="left")
    for each in found.candidates:
        cells = []
        for limit in budget.limits:
            cost, unit = each.costs[limit.name], SHOWN[limit.kind]
            cells.append(str(Prediction(cost.value / unit, cost.low / unit, cost.high / unit, cost.measured)))
        note = "yes" if each.keeps else "no"
        style = "bold green" if each.shape == found.chosen else "dim" if each.dominated or not each.keeps else ""
        table.add_row(each.shape, f"{each.loss:.3f}", *cells, note, style=style)
    return table
