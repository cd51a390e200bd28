"""Bars of the data sets library are shown where they tell something, and as the user set them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from amoeba_plugin.data.bars import without_bars
from amoeba_plugin.data.text import read_rows


@pytest.fixture(autouse=True)
def _bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    disabled = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    yield
    (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()


@pytest.mark.parametrize(("small", "shown"), [(True, False), (False, True)])
def test_a_bar_is_shown_where_it_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: bool, shown: bool
) -> None:
    with without_bars(small):
        Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert ("Saving the dataset" in capsys.readouterr().err) == shown


def test_a_small_file_is_read_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some words")
    assert read_rows(str(tmp_path / "text.txt"), "train")["text"] == ["some words"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("disabled", [True, False])
def test_afterwards_bars_are_as_the_user_set_them(disabled: bool) -> None:
    (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()
    with pytest.raises(KeyError), without_bars():
        assert datasets.are_progress_bars_disabled()
        raise KeyError
    assert datasets.are_progress_bars_disabled() == disabled


def test_what_the_environment_asks_for_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    with without_bars():
        assert not datasets.are_progress_bars_disabled()
