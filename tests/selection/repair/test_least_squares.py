"""Least squares from second moments, against the definition: a regression on the rows themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from amoeba_plugin.errors import DataError
from amoeba_plugin.selection.repair.least_squares import best_ridge, output_error, repaired_columns, repaired_prefixes
from amoeba_plugin.selection.repair.width import RIDGES

Case = tuple[Tensor, Tensor, int]  # rows, weight, columns kept


@st.composite
def cases(draw: st.DrawFn, rank_deficient: bool = True) -> Case:
    """Rows that may be fewer than channels, or have dead and repeated channels; a weight; what is kept of it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    channels = draw(st.integers(2, 12))
    rows = torch.randn(draw(st.integers(1 if rank_deficient else 30, 40)), channels, generator=generator).double()
    rows = rows * 10.0 ** torch.randint(-2, 3, (channels,), generator=generator)
    if rank_deficient and draw(st.booleans()):
        rows[:, draw(st.integers(0, channels - 1))] = 0
    if rank_deficient and draw(st.booleans()):
        rows[:, draw(st.integers(0, channels - 1))] = 3 * rows[:, draw(st.integers(0, channels - 1))]
    weight = torch.randn(draw(st.integers(1, 6)), channels, generator=generator).double()
    return rows, weight, draw(st.integers(1, channels))


def error_by_rows(rows: Tensor, weight: Tensor, repaired: Tensor) -> float:
    return sum(
        float((weight @ row - repaired @ row[: repaired.shape[1]]).square().sum()) for row in rows
    )  # the definition


@given(cases(), st.sampled_from([0.0, 1e-6, *RIDGES, 10.0]))
def test_repair_is_never_worse_than_the_cut_on_the_rows_that_it_saw(case: Case, ridge: float) -> None:
    rows, weight, kept = case
    repaired = repaired_columns(weight, rows.T @ rows, kept, ridge)
    assert bool(repaired.isfinite().all())
    cut = error_by_rows(rows, weight, weight[:, :kept])
    assert error_by_rows(rows, weight, repaired) <= cut + 1e-6 * (error_by_rows(rows, weight, 0 * repaired) + 1e-12)


@given(cases(rank_deficient=False), st.sampled_from(RIDGES))
def test_repair_is_the_ridge_regression_of_what_is_missing(case: Case, ridge: float) -> None:
    rows, weight, kept = case
    scale = rows.square().sum(dim=0).mean()
    # the ridge as rows of data: sqrt(ridge) I, with no target
    extended = torch.cat([rows[:, :kept], (ridge * scale).sqrt() * torch.eye(kept).double()])
    targets = torch.cat([rows[:, kept:] @ weight[:, kept:].T, torch.zeros(kept, len(weight)).double()])
    change = torch.linalg.lstsq(extended, targets).solution.T
    found = repaired_columns(weight, rows.T @ rows, kept, ridge)
    torch.testing.assert_close(found, weight[:, :kept] + change, rtol=1e-6, atol=1e-6)


@given(cases(rank_deficient=False), st.sampled_from(RIDGES))
def test_one_factor_repairs_every_width_as_each_by_itself_would(case: Case, ridge: float) -> None:
    """Against the formula with the inverse of every width's own moments."""
    rows, weight, _ = case
    moments, channels = rows.T @ rows, rows.shape[1]
    for kept, found in repaired_prefixes(weight, moments, range(1, channels + 1), ridge).items():
        inner = moments[:kept, :kept] + ridge * moments.diagonal().mean() * torch.eye(kept).double()
        expected = weight[:, :kept] + weight[:, kept:] @ moments[kept:, :kept] @ torch.linalg.inv(inner)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(cases(rank_deficient=False))
def test_what_is_linear_in_the_channels_kept_is_repaired_exactly(case: Case) -> None:
    rows, weight, kept = case
    rows[:, kept:] = rows[:, :kept] @ torch.randn(kept, rows.shape[1] - kept).double()
    repaired = repaired_columns(weight, rows.T @ rows, kept, 1e-13)
    whole = error_by_rows(rows, weight, 0 * repaired)
    assert error_by_rows(rows, weight, repaired) <= 1e-6 * whole


@given(cases(), st.sampled_from(RIDGES))
def test_where_nothing_is_removed_or_seen_nothing_changes(case: Case, ridge: float) -> None:
    rows, weight, kept = case
    channels = rows.shape[1]
    assert torch.equal(repaired_columns(weight, rows.T @ rows, channels, ridge), weight)
    assert torch.equal(
        repaired_columns(weight, torch.zeros(channels, channels).double(), kept, ridge), weight[:, :kept]
    )


@given(cases(), st.sampled_from(RIDGES))
def test_the_error_is_that_of_every_row(case: Case, ridge: float) -> None:
    rows, weight, kept = case
    repaired = repaired_columns(weight, rows.T @ rows, kept, ridge)
    expected = error_by_rows(rows, weight, repaired)
    found = float(output_error(weight, repaired, rows.T @ rows))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9 * error_by_rows(rows, weight, 0 * repaired) + 1e-12)


@given(cases(), st.integers(0, 1000))
def test_the_ridge_is_the_best_on_rows_held_out(case: Case, seed: int) -> None:
    rows, weight, kept = case
    others = torch.randn(7, rows.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    chosen = best_ridge(weight, rows.T @ rows, others.T @ others, kept, RIDGES)
    errors = {
        ridge: error_by_rows(others, weight, repaired_columns(weight, rows.T @ rows, kept, ridge)) for ridge in RIDGES
    }
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-6, abs=1e-9)


def test_channels_kept_that_are_all_dead_say_nothing() -> None:
    moments, weight = torch.zeros(4, 4).double(), torch.ones(2, 4)
    moments[3, 3] = 1
    assert torch.equal(repaired_columns(weight, moments, 2, 0.0), weight[:, :2].double())


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="second moments of activations are not finite"):
        repaired_columns(torch.ones(2, 4), torch.full((4, 4), torch.inf).double(), 2, 0.01)
