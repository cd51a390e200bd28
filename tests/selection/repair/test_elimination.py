"""Backward elimination against regressions on the rows themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amoeba_plugin.selection.repair.elimination import elimination_errors
from amoeba_plugin.selection.repair.least_squares import output_error, repaired_columns


def rows_of(channels: int, tokens: int = 200, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    ).double()


def error_without(rows: Tensor, weight: Tensor, gone: list[int]) -> float:
    """Regress the output on the channels that are left; what is left over."""
    left = [channel for channel in range(rows.shape[1]) if channel not in gone]
    output = rows @ weight.T
    if not left:
        return float(output.square().sum())
    solution = torch.linalg.lstsq(rows[:, left], output).solution
    return float((output - rows[:, left] @ solution).square().sum())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_units_go_one_by_one_as_regressions_say(size: int) -> None:
    """At every step the unit goes without which the regression on all others left is best."""
    rows, weight = rows_of(12), torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
    found = elimination_errors(weight, rows.T @ rows, size, ridge=1e-12)
    left, gone = list(range(12 // size)), list[int]()
    while left:
        tried = {unit: error_without(rows, weight, [*gone, *range(unit * size, (unit + 1) * size)]) for unit in left}
        unit = min(left, key=lambda each: tried[each])
        assert found[unit].item() == pytest.approx(tried[unit], rel=1e-6)
        left.remove(unit)
        gone += range(unit * size, (unit + 1) * size)


def test_many_units_at_once_are_nearly_as_good_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = rows_of(96, 500), torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    moments = rows.T @ rows

    def error(scores: Tensor) -> float:
        order = scores.argsort(descending=True)
        ordered, kept = moments[order][:, order], 48
        return float(output_error(weight[:, order], repaired_columns(weight[:, order], ordered, kept, 1e-9), ordered))

    several = error(elimination_errors(weight, moments, 1, 1e-9))
    monkeypatch.setattr("amoeba_plugin.selection.repair.elimination.AT_ONCE", 1000)
    one_by_one = error(elimination_errors(weight, moments, 1, 1e-9))
    at_random = error(torch.rand(96, generator=torch.Generator().manual_seed(0)))
    assert abs(several - one_by_one) < 0.1 * (at_random - one_by_one)


def test_dead_and_repeated_channels_are_worth_nothing() -> None:
    rows = rows_of(8)
    rows[:, 3] = 0
    rows[:, 5] = 2 * rows[:, 6]
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).double()
    order = elimination_errors(weight, rows.T @ rows, 1, 1e-9).argsort().tolist()
    assert 3 in order[:2]
    assert {5, 6} & set(order[:2])


def test_where_nothing_was_seen_all_units_are_alike() -> None:
    assert not elimination_errors(torch.ones(3, 4), torch.zeros(4, 4).double(), 2).any()
