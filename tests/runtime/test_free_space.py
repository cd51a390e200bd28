"""A disk without room is refused in words: what is needed, where, and what is free."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.free_space import one_disk, require_free

GB = 10**9


def test_every_disk_is_asked_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=GB if path == tmp_path else 5 * GB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    (tmp_path / "other").mkdir()
    require_free({tmp_path / "new" / "out": GB, tmp_path / "other": 5 * GB}, "free some")
    assert asked == [tmp_path, tmp_path / "other"]  # the nearest that exists
    message = r"the disk of .*new is too full: about 1\.2 GB are needed there, and 1\.0 GB are free; free some"
    with pytest.raises(ArtifactError, match=message):
        require_free({tmp_path / "other": 2 * GB, tmp_path / "new": 12 * GB // 10}, "free some")


def test_paths_that_are_still_to_come_are_on_the_disk_of_what_is_there(tmp_path: Path) -> None:
    assert one_disk(tmp_path / "some" / "where", tmp_path)
