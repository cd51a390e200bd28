"""What writes directly says of a full disk which directory it is, and leaves nothing half-written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.recipes.files import copy_recipe
from amoeba_plugin.runtime.files import whole_or_nothing
from amoeba_plugin.runtime.full_disk import full_disk_named
from amoeba_plugin.runtime.model_files import copy_tokenizer
from amoeba_plugin.runtime.state_store import StateStore
from support.small_disk import files_in, small_disk

SIZES = range(4, 32, 4)  # kB, by pages of the system


def outcomes(disk: Path, write: Callable[[], object]) -> list[dict[str, bytes]]:
    """What disks of growing sizes hold afterwards, each of which that is full was named."""
    found = []
    for size in SIZES:
        with small_disk(disk, size):
            try:
                write()
            except ArtifactError as error:
                assert f"the disk of {disk}" in str(error)  # noqa: PT017  # that it is refused depends on the size
                assert not files_in(disk)
            found.append(files_in(disk))
    return found


def test_a_tokenizer_is_there_whole_or_the_checkpoint_is_not(tmp_path: Path, base: Path):
    disk = tmp_path / "disk"

    def write() -> None:
        with whole_or_nothing(disk / "out") as partial:
            copy_tokenizer(str(base), partial)

    first, *_, last = outcomes(disk, write)
    assert not first
    assert {name.rpartition("/")[2] for name in last} == {"tokenizer.json", "tokenizer_config.json"}


def test_a_copied_recipe_is_there_whole_or_not_at_all(tmp_path: Path):
    first, *_, last = outcomes(tmp_path / "disk", lambda: copy_recipe("demo", tmp_path / "disk" / "recipe.yaml"))
    assert (len(first), len(last)) == (0, 1)


def test_states_that_find_no_room_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    with small_disk(tmp_path / "disk", 8):
        named = rf"disk of {tmp_path}/disk/amoeba_scratch_\w+ is full.*TMPDIR"
        with pytest.raises(ArtifactError, match=named), StateStore.of(budget=0) as store:
            store["states"] = torch.ones(10_000)
        assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), KeyError("name"), Exception("os error 2")])
def test_other_errors_are_left_as_they_are(error: Exception):
    with pytest.raises(type(error)) as caught, full_disk_named(Path("directory"), "free space"):
        raise error
    assert caught.value is error
