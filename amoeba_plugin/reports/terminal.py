"""The results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from amoeba_plugin.reports.format import millions, number, percent, size
from amoeba_plugin.reports.frontier_table import table_of
from amoeba_plugin.reports.report import QuantizedRow, Report, RequestRow


def print_report(report: Report, console: Console | None = None) -> None:
    """Print quality, cost, and what else a report has, a table each.

    Args:
        report: The results; what it lacks is left out.
        console: Where to; None: the standard output.
    """
    console = console or Console()
    console.print(_quality_table(report))
    console.print(_cost_table(report))
    if report.depth_selectors:
        console.print(_depth_table(report))
    if report.quantized is not None:
        console.print(_quantized_table(report.quantized))
    if report.policy is not None:
        console.print(f"Bits of every layer of the dense model: {report.policy.in_words}")
    for row in report.budgets:
        console.print(table_of(row.frontier))
        of = row.deployed
        console.print(f"{of.shape} as {of.flow}, {size(of.bytes)} in {of.directory}: {of.parity}")
        for each in of.skipped:
            console.print(f"not {each.shape} at {each.flow}: {each.why}")
    if report.requests:
        console.print(_request_table(report.requests))
    closed = report.median_gap_closed()
    if closed is not None:
        console.print(
            f"One-for-all training closes {percent(closed)} of the loss gap to the dense model (median of the shapes)."
        )


def _quality_table(report: Report) -> Table:
    table = Table(
        title=f"{report.title}\nHeld-out quality, before \u2192 after one-for-all training", title_justify="left"
    )
    table.add_column("shape")
    for heading in ("blocks", "loss, nats/token", "gap closed", "perplexity", "questions right"):
        table.add_column(heading, justify="right")
    for row in (report.dense, *report.shapes):
        before, after = row.before, row.after
        table.add_row(
            "dense" if row is report.dense else row.shape,
            percent(row.block_share),
            _change(number(before.loss, 3), None if after is None else number(after.loss, 3)),
            percent(None if row is report.dense else report.gap_closed(row)),
            _change(number(before.perplexity, 2), None if after is None else number(after.perplexity, 2)),
            _change(percent(before.accuracy), None if after is None else percent(after.accuracy)),
            style="bold" if row is report.dense else None,
        )
    return table


def _request_table(requests: Sequence[RequestRow]) -> Table:
    table = Table(title="One resident model, the same prompt, three targets for time", title_justify="left")
    table.add_column("target")
    for heading in ("shape", "first token, ms: promised", "measured", "each behind it, ms: promised", "measured"):
        table.add_column(heading, justify="right")
    for row in requests:
        took = (row.promised_ttft_ms, row.ttft_ms, row.promised_tpot_ms, row.tpot_ms)
        table.add_row(row.slo, row.shape, *(number(each, 1) for each in took))
    return table


def _cost_table(report: Report) -> Table:
    table = Table(title="Size and measured latency of the extracted checkpoints", title_justify="left")
    table.add_column("shape")
    for heading in ("blocks", "parameters", "checkpoint", "prefill ms", "decode ms/token"):
        table.add_column(heading, justify="right")
    for row in (report.dense, *report.shapes):
        table.add_row(
            "dense" if row is report.dense else row.shape,
            percent(row.block_share),
            millions(row.parameters),
            size(row.checkpoint_bytes),
            number(row.prefill_ms, 1),
            number(row.decode_ms, 2),
            style="bold" if row is report.dense else None,
        )
    return table


def _change(before: str, after: str | None) -> str:
    return before if after is None else f"{before} \u2192 {after}"


def _depth_table(report: Report) -> Table:
    table = Table("depth", "selector", title=f"Which layers to keep ({report.objective}; * best)", title_justify="left")
    for heading in ("objective", "held-out loss"):
        table.add_column(heading, justify="right")
    table.add_column("layers kept")
    best = report.best_selectors()
    for row in report.depth_selectors:
        mark = " *" if row is best[row.depth] else "  "
        layers = " ".join(map(str, row.kept_layers))
        table.add_row(
            str(row.depth), row.selector, number(row.objective, 4) + mark, number(row.held_out_loss, 4), layers
        )
    return table


def _quantized_table(row: QuantizedRow) -> Table:
    table = Table("", title=f"Quantized subnet {row.shape}, {row.scheme}", title_justify="left")
    for heading in ("size", "loss", "perplexity", "accuracy"):
        table.add_column(heading, justify="right")
    for name, count, quality in (
        ("unquantized", row.unquantized_bytes, row.unquantized),
        ("quantized", row.checkpoint_bytes, row.quality),
    ):
        table.add_row(
            name, size(count), number(quality.loss, 4), number(quality.perplexity, 3), percent(quality.accuracy)
        )
    return table
