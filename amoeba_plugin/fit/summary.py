"""What a fit found and made, in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.syntax import Syntax
from rich.table import Table

from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.fit.result import Fitted
from amoeba_plugin.reports.format import size
from amoeba_plugin.reports.frontier_table import table_of


def summary_of(found: Fitted, output: Path) -> Iterator[RenderableType]:
    """Yield what was tried, what was taken and what it costs, and where everything is."""
    frontier = output / "frontier.json"
    if frontier.is_file():
        yield table_of(Frontier.load(frontier))
    table = Table("", "", title=f"{found.model} within {found.budget}", title_justify="left", show_header=False)
    taken = found.deployed
    table.add_row("taken", f"{taken.shape} at {taken.flow}, {size(taken.bytes)} in {output / 'deployed'}")
    for name, cost in taken.costs.items():
        table.add_row(name, cost)
    table.add_row("loss on text that nothing saw", f"{found.loss} nats per token; the whole model {found.whole}")
    table.add_row("perplexity", f"{math.exp(found.loss.value):.2f}; the whole model {math.exp(found.whole.value):.2f}")
    table.add_row("by its engine", taken.parity)
    for each in taken.skipped:
        table.add_row(f"not {each.shape} at {each.flow}", each.why)
    table.add_row("seconds", ", ".join(f"{step} {seconds:.0f}" for step, seconds in found.seconds.items()))
    table.add_row("as a page", str(output / "report.html"))
    table.add_row("any other shape", f"amoeba deploy {output / 'elastic'} --shape SHAPE --flow ENGINE:SCHEME -o OUT")
    yield table
    yield f"\nIn {output / 'deployed'}:"
    for title, language, code in taken.ways:
        yield f"\n{title}"
        yield Syntax(code.strip(), language, background_color="default")
