"""What a run gained and lost: one model of the results, written as JSON, as a page, and as tables in the terminal."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.plots import gap_plot, latency_plot
from amoeba_plugin.strategy import write_atomically

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
FORMAT, VERSION = "amoeba_plugin.Report", 1
NO_BREAK = "\N{NO-BREAK SPACE}"
TEMPLATES = Path(__file__).parent / "templates"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quality(_Row):
    """How well a model does on held-out text.

    Attributes:
        loss: Cross-entropy, nats per token.
        perplexity: exp(loss).
        accuracy: Share of multiple-choice questions answered right, in [0, 1].
    """

    loss: float
    perplexity: float
    accuracy: float


class ShapeRow(_Row):
    """One subnet, or the dense model.

    Attributes:
        shape: DEPTHxWIDTH.
        parameters: Of the whole model, tied tensors counted once.
        block_share: Parameters of its decoder layers as a share of the dense model's, in (0, 1].
        checkpoint_bytes: Of all files of weights.
        before: Quality after selection alone; for the dense model, its quality.
        after: Quality with the one-for-all adapter folded in; ``None`` where nothing was trained.
        prefill_ms: Milliseconds to read the prompt, median of several measurements.
        decode_ms: Milliseconds per generated token, median of several measurements.
    """

    shape: str
    parameters: int
    block_share: float
    checkpoint_bytes: int
    before: Quality
    after: Quality | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None

    @property
    def best(self) -> Quality:
        """Quality of the finished subnet."""
        return self.after or self.before


class DepthRow(_Row):
    """One way to choose layers, at one depth.

    Attributes:
        selector: Its name, for people.
        depth: Layers kept.
        kept_layers: Their indices.
        objective: The objective on the selection data, where smaller is better unless ``Report.larger_is_better``.
        held_out_loss: Nats per token on text that selection did not see.
    """

    selector: str
    depth: int
    kept_layers: list[int]
    objective: float
    held_out_loss: float


class QuantizedRow(_Row):
    """The quantized subnet beside its unquantized self.

    Attributes:
        shape: DEPTHxWIDTH.
        scheme: What was done, in words.
        checkpoint_bytes: Of all files of weights.
        quality: Measured on the reloaded checkpoint.
        unquantized_bytes: Of the same subnet before quantization.
        unquantized: Its quality before quantization.
        mean_kl_divergence: Of the quantized from the unquantized subnet's predictions, nats per token.
    """

    shape: str
    scheme: str
    checkpoint_bytes: int
    quality: Quality
    unquantized_bytes: int
    unquantized: Quality
    mean_kl_divergence: float | None = None


class Provenance(_Row):
    """How the figures came about.

    Attributes:
        seed: Of everything random.
        created: Date and time, ISO 8601.
        hardware: What it ran on, in words.
        versions: Version by package.
        stage_seconds: Seconds by stage, in order.
        peak_memory_bytes: Largest resident size of the process; ``None`` where the system does not tell.
        data: What was measured on which text, in words, by purpose.
    """

    seed: int
    created: str
    hardware: str
    versions: dict[str, str]
    stage_seconds: dict[str, float]
    peak_memory_bytes: int | None = None
    data: dict[str, str] = Field(default_factory=dict)


class Report(_Row):
    """Everything the demo shows.

    Attributes:
        format: Always ``amoeba_plugin.Report``.
        version: Of the format.
        title: What was compressed.
        dense: The untouched model.
        shapes: Subnets, largest first.
        depth_selectors: Ways to choose layers, compared at the same depths.
        objective: What the dynamic program optimised, with its unit.
        larger_is_better: Its direction.
        quantized: ``None`` where nothing was quantized.
        provenance: How the figures came about.
    """

    format: Literal["amoeba_plugin.Report"] = "amoeba_plugin.Report"
    version: Literal[1] = 1
    title: str
    dense: ShapeRow
    shapes: list[ShapeRow]
    depth_selectors: list[DepthRow] = Field(default_factory=list)
    objective: str = "loss, nats per token"
    larger_is_better: bool = False
    quantized: QuantizedRow | None = None
    provenance: Provenance

    def gap_before(self, row: ShapeRow) -> float:
        """Held-out loss above the dense model's after selection alone, nats per token."""
        return row.before.loss - self.dense.before.loss

    def gap_after(self, row: ShapeRow) -> float | None:
        """Held-out loss above the dense model's after one-for-all training, nats per token."""
        return None if row.after is None else row.after.loss - self.dense.before.loss

    def gap_closed(self, row: ShapeRow) -> float | None:
        """Share of the gap that training closed; ``None`` where there was none to close."""
        before, after = self.gap_before(row), self.gap_after(row)
        return None if after is None or before <= 0 else 1 - after / before

    def median_gap_closed(self) -> float | None:
        """Median of :meth:`gap_closed` over the shapes."""
        closed = [value for row in self.shapes if (value := self.gap_closed(row)) is not None]
        return statistics.median(closed) if closed else None

    def best_selectors(self) -> dict[int, DepthRow]:
        """Return, for each depth compared, the selector that is best on the objective."""
        sign = -1 if self.larger_is_better else 1
        depths = sorted({row.depth for row in self.depth_selectors}, reverse=True)
        return {
            depth: min(
                (row for row in self.depth_selectors if row.depth == depth), key=lambda row: sign * row.objective
            )
            for depth in depths
        }


def write_report(report: Report, directory: Path) -> None:
    """Write ``report.json`` and a self-contained ``report.html``: no script, no request to anywhere.

    Args:
        report: The results.
        directory: Made where it does not exist; older reports in it are replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / REPORT_HTML, render_html(report).encode())
    write_atomically(directory / REPORT_JSON, report.model_dump_json(indent=1).encode())


def read_report(path: Path) -> Report:
    """Read a ``report.json``.

    Raises:
        ArtifactError: If there is none, or it is damaged, or of another format.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"the report {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is damaged or no {FORMAT} of version {VERSION}; repeat the run that wrote it"
        ) from error


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
    latencies = [(row.shape, row.block_share, row.prefill_ms or 0.0, row.decode_ms or 0.0) for row in timed]
    return environment.get_template("report.html.j2").render(
        report=report,
        gap_svg=Markup(gap_plot(gaps)),  # made here, from numbers and parsed shapes
        latency_svg=Markup(latency_plot(latencies)) if timed else None,
        best=report.best_selectors(),
    )


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the results as tables."""
    console = console or Console()
    console.print(_quality_table(report))
    console.print(_cost_table(report))
    if report.depth_selectors:
        console.print(_depth_table(report))
    if report.quantized is not None:
        console.print(_quantized_table(report.quantized))
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


def number(value: float | None, digits: int = 2) -> str:
    """Write a number with a fixed count of decimals, a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"  # noqa: RUF001  # a dash, as tables have it


def percent(value: float | None) -> str:
    """Write a share in percent."""
    return "–" if value is None else f"{100 * value:.0f}{NO_BREAK}%"  # noqa: RUF001


def millions(count: int) -> str:
    """Write a count of parameters.

    >>> print(millions(3_540_000), millions(6_700_000_000))  # with no-break spaces
    3.54 M 6.70 B
    """
    return f"{count / 1e9:.2f}{NO_BREAK}B" if count >= 1e9 else f"{count / 1e6:.2f}{NO_BREAK}M"


def size(count: int) -> str:
    """Write a number of bytes in decimal units.

    >>> print(size(7_100_000), size(13_500_000_000))  # with no-break spaces
    7.10 MB 13.50 GB
    """
    return f"{count / 1e9:.2f}{NO_BREAK}GB" if count >= 1e9 else f"{count / 1e6:.2f}{NO_BREAK}MB"
