"""A search's picture and table: every choice is where its figures say, the budget is in sight, and intervals speak."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.deployment.search.frontier import Candidate, Cost, Frontier, Interval
from amoeba_plugin.reports.frontier_plot import COLOURS, drawn
from amoeba_plugin.reports.frontier_table import notes_on, table_of
from amoeba_plugin.reports.picture import save_figure

BUDGET = "llama-cpp:Q8_0,Q4_0 decode<=4ms file<=9MB"


def candidate(
    shape: str, scheme: str, value: float, decode: float, size: float, half: float = 0.02, dominated: bool = False
) -> Candidate:
    def cost(of: float, measured: bool) -> Cost:
        return Cost(value=of, low=0.9 * of, high=1.1 * of, measured=measured)

    return Candidate(
        shape=shape, flow=f"llama-cpp:{scheme}", quality=Interval(value=value, low=value - 0.2, high=value + 0.2),
        behind=Interval(value=value - 3.1, low=value - 3.1 - half, high=value - 3.1 + half),
        costs={"decode": cost(decode * 1e-3, True), "file": cost(size * 1e6, False)},
        keeps=decode <= 4 and size <= 9, dominated=dominated, deploy="amoeba deploy",
    )  # fmt: skip


@pytest.fixture
def found() -> Frontier:
    candidates = [
        candidate("12x1", "Q8_0", 3.0, 5.0, 12.0), candidate("12x1", "Q4_0", 3.1, 3.5, 7.0, half=0.0),
        candidate("10x1", "Q4_0", 3.11, 3.0, 6.0), candidate("10x1", "Q8_0", 3.3, 4.2, 10.0, dominated=True),
    ]  # fmt: skip
    return Frontier(
        budget=BUDGET, searcher="exhaustive", evaluator="loss", unit="nats per token", larger_is_better=False,
        shapes=9, evaluated=2, measured=1, finalists=1, open=0, chosen="12x1", flow="llama-cpp:Q4_0",
        candidates=candidates,
    )  # fmt: skip


def test_every_choice_is_where_its_figures_say(found: Frontier):
    panels = drawn(found).axes
    for axes, limit in zip(panels, Budget.parse(BUDGET).limits, strict=True):
        unit = limit.unit[1]
        places = {tuple(round(float(x), 6) for x in at) for dots in axes.collections for at in _offsets(dots)}
        for each in found.candidates:
            assert (round(each.costs[limit.name].value / unit, 6), round(each.quality.value, 6)) in places
        (line,) = [each for each in axes.lines if each.get_label() == "budget"]
        assert line.get_xdata()[0] == pytest.approx(limit.most / unit)
        left, right = axes.get_xlim()
        assert left < limit.most / unit < right
        assert axes.get_xlabel() == f"{limit.name}, {limit.unit[0]}"
    assert panels[0].get_ylabel() == "loss, nats per token"


def _offsets(dots: object) -> list[tuple[float, float]]:
    return list(getattr(dots, "get_offsets", list)())


@pytest.mark.parametrize("larger_is_better", [False, True])
def test_bars_are_the_intervals_of_the_difference_from_the_choice(found: Frontier, larger_is_better: bool):
    lopsided = found.candidates[0].model_copy(update={"behind": Interval(value=-0.1, low=-0.14, high=-0.09)})
    found = found.model_copy(
        update={"candidates": [lopsided, *found.candidates[1:]], "larger_is_better": larger_is_better}
    )
    panel = drawn(found).axes[0]
    ends = {tuple(round(float(y), 6) for y in sorted({y for _, y in path.vertices})) for dots in panel.collections
            for path in dots.get_paths() if len(path.vertices) == 2}  # fmt: skip
    wanted = (2.99, 3.04) if larger_is_better else (2.96, 3.01)
    assert wanted in ends
    assert (3.09, 3.13) in ends
    assert not any(low < 3.3 < high for low, high in (each for each in ends if len(each) == 2)), "dominated: no bars"


def test_a_budget_beyond_every_choice_is_in_sight(found: Frontier):
    wide = found.model_copy(update={"budget": "llama-cpp:Q8_0,Q4_0 decode<=400ms file<=9MB"})
    assert drawn(wide).axes[0].get_xlim()[1] > 400


def test_the_picture_names_schemes_budget_and_choice(found: Frontier, tmp_path: Path):
    save_figure(lambda: drawn(found), tmp_path / "a.svg", "frontier")
    text = (tmp_path / "a.svg").read_text()
    for word in ("llama-cpp:Q8_0", "llama-cpp:Q4_0", "budget", "chosen", "12x1", "decode, ms", "file, MB"):
        assert f">{word}<" in text
    assert all(colour in text for colour in COLOURS[:2])


def test_the_table_and_what_the_intervals_say(found: Frontier):
    console = Console(file=io.StringIO(), width=90)
    console.print(table_of(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split()[1:6:2] for line in text.splitlines() if "Q4_0  " in line] == [
        ["12x1", "Q4_0", "3.100"],
        ["10x1", "Q4_0", "3.110"],
    ]
    assert "cannot be told apart" in " ".join(notes_on(found))
    apart = found.candidates[2].model_copy(update={"behind": Interval(value=0.05, low=0.01, high=0.09)})
    candidates = [*found.candidates[:2], apart, found.candidates[3]]
    told = " ".join(notes_on(found.model_copy(update={"candidates": candidates, "open": 3})))
    assert "the second best, 10x1 at llama-cpp:Q4_0, is worse by 0.050 (0.010 to 0.090)" in told
    assert "3 more could be better" in told
