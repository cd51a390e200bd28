"""Directories of results: whole or not at all, wherever they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import FILLING, is_vacant, require_writable, whole_or_nothing

PARTIAL_INSIDE = ".amoeba.partial"


def fill(directory: Path, content: str = "new", replace: bool = False) -> None:
    with whole_or_nothing(directory, replace) as partial:
        (partial / "file").write_text(content)
        (partial / "folder").mkdir()
        (partial / "folder" / "file").write_text(content)


def content_of(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


NEW = {"file": "new", "folder/file": "new"}


@pytest.mark.parametrize(
    "name", ["new", "deep/new", "empty", "link", "dangling", ".", "empty/../new", "päth with space"]
)
def test_a_directory_is_filled_wherever_its_name_leads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    Path("empty").mkdir() if name != "." else None
    (tmp_path / "elsewhere").mkdir()
    Path("link").symlink_to(tmp_path / "elsewhere") if name == "link" else None
    Path("dangling").symlink_to(tmp_path / "absent") if name == "dangling" else None
    require_writable(Path(name), whole=True)
    with pytest.raises(KeyError), whole_or_nothing(Path(name)) as partial:
        (partial / "half").write_text("")
        raise KeyError
    assert is_vacant(Path(name))
    fill(Path(name))
    assert content_of(Path(name)) == NEW
    assert Path(name).is_symlink() == (name in ("link", "dangling"))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_mounted_disk_is_filled_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == disk)
    with whole_or_nothing(disk) as partial:
        assert partial == disk / PARTIAL_INSIDE
        (partial / "file").write_text("")
    assert [entry.name for entry in disk.iterdir()] == ["file"]
    (disk / "file").unlink()
    (disk / PARTIAL_INSIDE).mkdir()  # as a killed run leaves it
    (disk / PARTIAL_INSIDE / "half").write_text("")
    assert is_vacant(disk)
    fill(disk)
    assert content_of(disk) == NEW


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_replaced_goes_when_the_new_is_whole(linked: bool, tmp_path: Path) -> None:
    name = tmp_path / "name"
    if linked:
        (tmp_path / "elsewhere").mkdir()
        name.symlink_to(tmp_path / "elsewhere")
    fill(name, "old", replace=True)
    (name / "also").write_text("old")
    with pytest.raises(KeyError), whole_or_nothing(name, replace=True):
        raise KeyError
    assert len(content_of(name)) == 3
    fill(name, replace=True)
    assert content_of(name) == NEW
    with pytest.raises(ArtifactError, match="filled by something else"):
        fill(name, "newest")
    assert content_of(name) == NEW


def test_what_a_killed_process_left_half_stays_vacant_when_filling_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("half")
    (tmp_path / FILLING).touch()
    with monkeypatch.context() as broken:
        broken.setattr("shutil.move", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fill(tmp_path)
    assert is_vacant(tmp_path)
    fill(tmp_path)
    assert content_of(tmp_path) == NEW
