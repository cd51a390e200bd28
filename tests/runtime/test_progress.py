"""Stages that take long say so, once, early."""

from __future__ import annotations

import logging

import pytest

from amoeba_plugin.runtime.progress import StageBar


class Clock:
    """Moves on by so many seconds whenever it is looked at through ``move``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, []), (4.0, ["search: about 33 min at this pace; less data"])])
def test_a_long_stage_says_once_how_long(
    seconds: float, expected: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    bar = StageBar(total=500, desc="search", shorter="less data", mininterval=0)
    monkeypatch.setattr(bar, "_time", clock)
    bar.start_t = clock.now
    with caplog.at_level(logging.INFO), bar:
        for _ in range(10):
            clock.now += seconds
            bar.update()
    assert [record.getMessage().partition(" would")[0] for record in caplog.records] == expected


def test_a_silent_bar_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert list(StageBar(range(3), shorter="less data", disable=True)) == [0, 1, 2]
    assert not caplog.records
