"""README's picture, drawn from the demo's table: ``python docs/gap.py`` rewrites ``docs/gap.svg``."""

from __future__ import annotations

import re
from pathlib import Path

from amoeba_plugin.reports.picture import inline_svg
from amoeba_plugin.reports.plots import gap_plot

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "benchmarks" / "RESULTS.md"
PICTURE = Path(__file__).with_suffix(".svg")
# A page of Markdown has no style sheet: the colours of report.html in light, and paper to stand on in dark.
COLOURS = {"ink": "#1d2126", "line": "#e3e5e8", "before": "#c8772e", "after": "#2f6fb3"}
PAPER = "#ffffff"
DENSE_ROW = re.compile(r"^\| dense \| 100 % \| ([\d.]+) \|", re.MULTILINE)
SHAPE_ROW = re.compile(r"^\| (\d+x[\d/]+) \| (\d+) % \| ([\d.]+) → ([\d.]+) \|", re.MULTILINE)


def points(page: str) -> list[tuple[str, float, float, float | None]]:
    """Return (shape, share of block parameters, gap before, gap after) of every subnet; gaps in nats per token."""
    dense = DENSE_ROW.search(page)
    if dense is None:
        raise ValueError(f"{TABLE} has no row of the dense model")
    loss = float(dense.group(1))
    rows = [(shape, int(share) / 100, float(a), float(b)) for shape, share, a, b in SHAPE_ROW.findall(page)]
    return [(shape, share, a - loss, b - loss) for shape, share, a, b in rows if share < 1]


def described(drawn: list[tuple[str, float, float, float | None]]) -> str:
    """Return what the picture shows in words, for who cannot see it, and for the test that it shows the table."""
    return "; ".join(f"{shape} {before:.3f} to {after:.3f}" for shape, _, before, after in drawn)


def picture(page: str) -> str:
    """Return the picture as a file of its own."""
    drawn = points(page)
    svg = inline_svg(lambda: gap_plot(drawn), "gap", "Loss gap to the dense model over block parameters")
    for name, colour in COLOURS.items():
        svg = svg.replace(f"var(--{name})", colour)
    desc = f"<desc>Nats per token above the dense model, before and after training: {described(drawn)}</desc>"
    paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"<svg ([^>]*)>", rf"<svg {namespaces} \1>{desc}{paper}", svg, count=1)


if __name__ == "__main__":
    PICTURE.write_text(picture(TABLE.read_text(encoding="utf-8")), encoding="utf-8")
