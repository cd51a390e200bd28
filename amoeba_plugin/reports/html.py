"""The results as a page that needs nothing else, beside the JSON file it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.reports import frontier_plot, policy_plot, profile_plot
from amoeba_plugin.reports.format import millions, number, percent, size
from amoeba_plugin.reports.frontier_table import headings_of, lines_of, notes_on
from amoeba_plugin.reports.picture import inline_svg
from amoeba_plugin.reports.plots import gap_plot, latency_plot
from amoeba_plugin.reports.report import REPORT_JSON, Report
from amoeba_plugin.runtime.files import write_atomically

REPORT_HTML = "report.html"
TEMPLATES = Path(__file__).parent / "templates"


def write_report(report: Report, directory: Path) -> None:
    """Write ``report.json`` and a self-contained ``report.html``: no script, no request to anywhere.

    Args:
        report: All that is shown; what it lacks is left out of the page.
        directory: Made where it does not exist; older reports in it are replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / REPORT_HTML, render_html(report).encode())
    write_atomically(directory / REPORT_JSON, report.model_dump_json(indent=1).encode())


def render_html(report: Report) -> str:
    """Return the report as one HTML page that follows the reader's light or dark setting."""
    timed = [row for row in (report.dense, *report.shapes) if row.prefill_ms is not None and row.decode_ms is not None]
    gaps = [(row.shape, row.block_share, report.gap_before(row), report.gap_after(row)) for row in report.shapes]
    latencies = [
        ("dense" if row is report.dense else row.shape, row.block_share, row.prefill_ms or 0.0, row.decode_ms or 0.0)
        for row in timed
    ]
    gap = figure(lambda: gap_plot(gaps), "gap", "Loss gap to the dense model over block parameters, by training")
    latency = None
    if timed:
        latency = figure(lambda: latency_plot(latencies), "latency", "Prefill and decode latency over block parameters")
    policy, bits = report.policy, None
    if policy is not None:
        bits = figure(lambda: policy_plot.drawn(policy), "policy", "Bits of every layer")
    return render_page(
        "report.html.j2",
        [row.frontier for row in report.budgets],
        report.profile,
        report=report, gap_svg=gap, latency_svg=latency, policy_svg=bits, best=report.best_selectors(),
    )  # fmt: skip


def render_page(template: str, frontiers: Sequence[Frontier], profile: Profile | None, **values: object) -> str:
    """Return a page of a template.

    Args:
        template: Its file.
        frontiers: Drawn for it, as ``frontier_svgs``.
        profile: Drawn for it, as ``profile_svg``.
        values: What else it names.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "size": size, "percent": percent, "millions": millions}
    environment.globals |= {"headings": headings_of, "lines": lines_of, "notes": notes_on}
    return environment.get_template(template).render(
        frontier_svgs=[
            figure(partial(frontier_plot.drawn, found), f"frontier{number}", "Quality over costs, with the budget")
            for number, found in enumerate(frontiers)
        ],
        profile_svg=figure(partial(profile_plot.drawn, profile), "profile", "Time over depth and width")
        if profile else None,
        **values,
    )  # fmt: skip


def figure(draw: Callable[[], Figure], name: str, title: str) -> Markup:
    """Return a figure for a page: it is made here, and text in it is escaped by matplotlib."""
    return Markup(inline_svg(draw, name, title))
