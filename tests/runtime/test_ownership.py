"""Directories that one process owns: others are refused at once, until it lets go or dies."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
from filelock import FileLock, UnixFileLock

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import whole_or_nothing
from amoeba_plugin.runtime.ownership import LOCK, owning, workplace
from amoeba_plugin.runtime.scratch import PREFIX, scratch_directory
from support.forked import finish, forked, killed


def test_another_process_is_refused_with_the_holder(tmp_path: Path) -> None:
    directory = tmp_path / "out"

    def other() -> None:
        with pytest.raises(ArtifactError, match=rf"out is being written by process {parent}, which began at 20"):
            whole_or_nothing(directory).__enter__()
        with owning(tmp_path / "beside"):
            pass

    parent = os.getpid()
    with owning(directory):
        finish(forked(other))
        directory.mkdir()  # what is written meanwhile changes nothing
        finish(forked(other))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with owning(directory):
        pass


def test_the_lock_ends_with_its_process_however_that_dies(tmp_path: Path) -> None:
    def own() -> object:
        return (block := owning(tmp_path / "deep/out")), block.__enter__()  # not collected, which would end it

    killed(own)
    assert workplace(tmp_path / "deep/out", LOCK).exists()
    with owning(tmp_path / "deep/out"):
        pass
    assert not list((tmp_path / "deep").iterdir())


def test_blocks_of_one_process_are_nested_but_for_two_that_fill_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    with owning(directory), owning(directory), whole_or_nothing(directory) as partial:
        (partial / "file").write_text("first")
        with pytest.raises(ArtifactError, match="by this very process"), whole_or_nothing(directory):
            pass
    assert (directory / "file").read_text() == "first"
    with owning(directory, alone=True):  # all that was taken has been given back
        pass


def test_parents_made_for_a_lock_go_with_it(tmp_path: Path) -> None:
    with owning(tmp_path / "deep/deeper/out"):
        assert (tmp_path / "deep/deeper").is_dir()
    assert not list(tmp_path.iterdir())
    with owning(tmp_path / "deep/deeper/out"):
        (tmp_path / "deep/file").write_text("")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file/deep/out cannot be written"), owning(tmp_path / "file/deep/out"):
        pass


@pytest.mark.parametrize("missing", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_where_a_file_system_has_no_locks_a_warning_says_so(
    missing: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: FileLock) -> None:
        raise missing

    monkeypatch.setattr(UnixFileLock, "_acquire", refuse)
    with caplog.at_level(logging.WARNING), whole_or_nothing(tmp_path / "out") as partial:
        (partial / "file").write_text("")
    assert "out cannot be locked" in caplog.text
    assert (tmp_path / "out/file").exists()


def _scratch() -> object:
    block = scratch_directory()
    (block.__enter__() / "states").write_text("")
    return block


def test_scratch_of_a_killed_process_goes_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    killed(_scratch)
    assert len(list(tmp_path.glob(f"{PREFIX}*/states"))) == 1
    with scratch_directory() as first:
        (first / "mine").write_text("")
        assert [path.name for path in tmp_path.glob(f"{PREFIX}*/*")] == ["mine"]
        with scratch_directory() as second:
            assert first != second
        finish(forked(_scratch))
        assert (first / "mine").exists()
    assert not list(tmp_path.glob(f"{PREFIX}*/mine"))
