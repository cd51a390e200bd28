"""A fit as a page: what was taken and how it runs, what was tried, and what shapes cost."""

from __future__ import annotations

import math
from pathlib import Path

from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.search.frontier import Frontier
from amoeba_plugin.fit.result import Fitted
from amoeba_plugin.reports.html import REPORT_HTML, render_page
from amoeba_plugin.reports.report import DeployedRow
from amoeba_plugin.runtime.files import write_atomically


def write_page(found: Fitted, frontier: Frontier, profile: Profile, output: Path) -> None:
    """Write ``report.html``: no script, no request to anywhere."""
    taken = found.deployed
    row = DeployedRow(
        shape=taken.shape, flow=taken.flow, bytes=taken.bytes, parity=taken.parity,
        directory=str(output / "deployed"), ways=taken.ways, skipped=taken.skipped,
    )  # fmt: skip
    perplexity = {"subnet": math.exp(found.loss.value), "whole": math.exp(found.whole.value)}
    text = render_page(
        "fit.html.j2", [frontier], profile, found=found, frontier=frontier, row=row, perplexity=perplexity,
        elastic=output / "elastic",
    )  # fmt: skip
    write_atomically(output / REPORT_HTML, text.encode())
