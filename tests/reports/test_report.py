"""The report: figures that follow from figures, a page that asks for nothing, tables that fit a terminal."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from amoeba_plugin.reports import policy_plot
from amoeba_plugin.reports.html import render_html, write_report
from amoeba_plugin.reports.report import (
    DepthRow,
    Provenance,
    Quality,
    QuantizedRow,
    Report,
    RequestRow,
    ShapeRow,
)
from amoeba_plugin.reports.terminal import print_report
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy, UnitPolicy


def quality(loss: float, accuracy: float = 0.8) -> Quality:
    return Quality(loss=loss, perplexity=math.exp(loss), accuracy=accuracy)


def row(shape: str, share: float, before: float, after: float | None) -> ShapeRow:
    return ShapeRow(
        shape=shape,
        parameters=int(4e6 * share),
        block_share=share,
        checkpoint_bytes=int(8e6 * share),
        before=quality(before),
        after=None if after is None else quality(after),
        prefill_ms=30 * share,
        decode_ms=10 * share,
    )


def policy() -> LayerwisePolicy:
    """Every cell says something else."""
    options = [(4, 0.0), (8, 0.25), (16, 0.5)]
    units = {
        f"{layer}.{kind}": UnitPolicy(
            modules=[kind], rows=8, columns=64 * 2**place, bits=bits, sparsity=zeros + layer / 8
        )
        for layer in range(2)
        for place, (kind, (bits, zeros)) in enumerate(
            zip(("q_proj+k_proj+v_proj", "o_proj", "mlp.down_proj"), options, strict=True)
        )
    }
    return LayerwisePolicy(sensitivity="kl", allocation="knapsack", group_size=64, symmetric=True, units=units)


@pytest.fixture
def report() -> Report:
    return Report(
        title="A model <with> & in its name",
        dense=row("12x1", 1.0, 2.0, None),
        shapes=[row("10x1", 0.83, 2.4, 2.1), row("10x7/8", 0.73, 2.8, 2.4), row("8x3/4", 0.5, 4.0, 3.5)],
        depth_selectors=[
            DepthRow(selector="dynamic program", depth=8, kept_layers=[0, 2, 11], objective=2.5, held_out_loss=2.6),
            DepthRow(selector="random", depth=8, kept_layers=[1, 2, 11], objective=3.5, held_out_loss=3.6),
        ],
        quantized=QuantizedRow(
            shape="10x7/8",
            scheme="W4A16",
            checkpoint_bytes=2_000_000,
            quality=quality(2.5),
            unquantized_bytes=5_800_000,
            unquantized=quality(2.4),
            mean_kl_divergence=0.01,
        ),
        policy=policy(),
        requests=[
            RequestRow(
                slo="ttft 12 ms",
                shape="8x3/4",
                said="if a < b: <i>",
                promised_ttft_ms=11.25,
                ttft_ms=11.5,
                promised_tpot_ms=3.0,
                tpot_ms=3.125,
            )
        ],
        provenance=Provenance(
            seed=7,
            created="2026-01-01T00:00:00+00:00",
            hardware="2 CPU cores",
            versions={"torch": "2.13.0"},
            stage_seconds={"selection": 12.5},
            peak_memory_bytes=2_000_000_000,
            data={"evaluation": "held-out modules"},
        ),
    )


def test_the_gap_and_what_training_closed_of_it(report: Report):
    assert report.gap_before(report.shapes[0]) == pytest.approx(0.4)
    assert report.gap_after(report.shapes[0]) == pytest.approx(0.1)
    assert [report.gap_closed(each) for each in report.shapes] == pytest.approx([0.75, 0.5, 0.25])
    assert report.median_gap_closed() == pytest.approx(0.5)


def test_nothing_trained_closes_nothing(report: Report):
    untrained = report.model_copy(update={"shapes": [row("8x1", 0.7, 3.0, None), row("9x1", 0.8, 1.9, 1.8)]})
    assert untrained.median_gap_closed() is None  # the second was no worse than dense to begin with
    assert "closed" not in printed(untrained).splitlines()[-1]
    render_html(untrained)


def test_the_best_selector_follows_the_direction_of_the_objective(report: Report):
    assert report.best_selectors()[8].selector == "dynamic program"
    accuracy = report.model_copy(update={"larger_is_better": True})
    assert accuracy.best_selectors()[8].selector == "random"


def test_what_is_written_reads_back_and_replaces_the_older_one(report: Report, tmp_path: Path):
    write_report(report.model_copy(update={"title": "older"}), tmp_path / "new" / "directory")
    write_report(report, tmp_path / "new" / "directory")
    written = (tmp_path / "new" / "directory" / "report.json").read_bytes()
    assert Report.model_validate_json(written) == report
    assert sorted(path.name for path in (tmp_path / "new" / "directory").iterdir()) == ["report.html", "report.json"]


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that elements nest."""

    void = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.void:
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._look(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def test_the_page_is_whole_and_asks_for_nothing(report: Report):
    text = render_html(report)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.fetched)
    assert {reference[1:] for reference in page.fetched} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)


def test_the_page_escapes_what_it_is_given(report: Report):
    text = render_html(report)
    assert "A model &lt;with&gt; &amp; in its name" in text
    assert "<with>" not in text
    assert "if a &lt; b: &lt;i&gt;" in text


def test_the_page_holds_every_shape_and_is_the_same_every_time(report: Report):
    text = render_html(report)
    for each in report.shapes:
        assert text.count(each.shape) >= 2  # in the plot and in the table
    assert text == render_html(report)
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", text)  # no colour that only one theme can show


def test_a_policy_has_a_cell_for_every_unit_of_every_layer(report: Report):
    found = policy()
    (axes,) = policy_plot.drawn(found).axes
    shown = {(round(each.get_position()[1]), round(each.get_position()[0])): each.get_text() for each in axes.texts}
    assert shown == {
        (0, 0): "4", (1, 0): "8\n25%", (2, 0): "16\n50%", (0, 1): "4\n12%", (1, 1): "8\n38%", (2, 1): "16\n62%",
    }  # fmt: skip
    assert [each.get_text() for each in axes.get_yticklabels()] == ["q, k, v", "o", "down"]
    assert f"at {found.in_words} on" in render_html(report)
    assert "Bits of every layer" in printed(report)
    assert "Bits of every layer" not in render_html(report.model_copy(update={"policy": None}))


def test_requests_have_what_they_were_promised_and_what_they_got(report: Report):
    row = ("ttft 12 ms", "8x3/4", "11.2", "11.5", "3.0", "3.1")
    shown = printed(report).partition("three targets for time")[2]
    page = render_html(report).partition("three targets for time")[2]
    assert all(each in shown and each in page for each in row)


def test_every_point_of_the_latency_plots_has_its_name(report: Report):
    plots = render_html(report).partition('aria-label="Prefill and decode latency')[2].partition("</svg>")[0]
    for name in ("dense", *(row.shape for row in report.shapes)):
        assert plots.count(f">{name}</text>") == 2


def test_a_report_without_latency_depths_or_quantization_renders(report: Report):
    bare = report.model_copy(
        update={
            "dense": report.dense.model_copy(update={"prefill_ms": None}),
            "shapes": [each.model_copy(update={"decode_ms": None}) for each in report.shapes],
            "depth_selectors": [],
            "quantized": None,
        }
    )
    text = render_html(bare)
    assert "Quantized subnet" not in text
    assert "Which layers" not in text
    assert "<h2>Latency" not in text
    printed(bare)


def printed(report: Report, width: int = 80) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_tables_fit_eighty_columns(report: Report):
    text = printed(report)
    assert "…" not in text
    assert "2.400 → 2.100" in text
    assert "75\N{NO-BREAK SPACE}%" in text
    assert "2.5000 *" in text
    assert "2.00\N{NO-BREAK SPACE}MB" in text
    assert "closes 50\N{NO-BREAK SPACE}% of the loss gap" in text
