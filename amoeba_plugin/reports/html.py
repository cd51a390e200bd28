"""The results as a page that needs nothing else, beside the JSON file it was made from."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from amoeba_plugin.reports.format import millions, number, percent, size
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
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "size": size, "percent": percent, "millions": millions}
    timed = [row for row in (report.dense, *report.shapes) if row.prefill_ms is not None and row.decode_ms is not None]
    gaps = [(row.shape, row.block_share, report.gap_before(row), report.gap_after(row)) for row in report.shapes]
    latencies = [
        ("dense" if row is report.dense else row.shape, row.block_share, row.prefill_ms or 0.0, row.decode_ms or 0.0)
        for row in timed
    ]
    return environment.get_template("report.html.j2").render(
        report=report,
        gap_svg=Markup(gap_plot(gaps)),  # made here, from numbers and parsed shapes
        latency_svg=Markup(latency_plot(latencies)) if timed else None,
        best=report.best_selectors(),
    )
