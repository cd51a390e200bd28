"""A disk that fills while a checkpoint is written, by whichever writer: it is there whole, or what was before is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM

from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from support.models import make_tiny_model, random_elastic, save_base
from support.small_disk import files_in, small_disk
from support.training import add_smol

LARGE = 2000  # kB


def sizes_that_held(disk: Path, sizes: range, *writes: Callable[[], object]) -> list[tuple[int, int]]:
    """Write on disks of these sizes, in kB; return which writes, by size, ended well."""
    held = []
    for size in (*sizes, LARGE):
        with small_disk(disk, size):
            for number, write in enumerate(writes):
                before = files_in(disk)
                try:
                    write()
                except ArtifactError as error:
                    assert str(disk) in str(error)  # noqa: PT017  # that it is refused depends on the size
                    assert "Free space" in str(error)  # noqa: PT017
                    assert files_in(disk) == before
                else:
                    held.append((size, number))
    return held


def test_a_full_disk_leaves_whole_checkpoints_only(tmp_path: Path):
    base, elastic, disk = (
        save_base(make_tiny_model("llama"), tmp_path / "base"),
        tmp_path / "elastic",
        tmp_path / "disk",
    )
    model = random_elastic(AutoModelForCausalLM.from_pretrained(base).eval())
    adapted = add_smol(model, task_type="CAUSAL_LM")

    def save(directory: Path) -> None:
        save_elastic(model, adapted, directory, str(base))
        load_elastic(directory)

    held = sizes_that_held(disk, range(8, 500, 120), lambda: save(disk / "new"), lambda: save(disk / "new"))
    assert held[-2:] == [(LARGE, 0), (LARGE, 1)]
    assert {size for size, number in held if number == 0} > {
        size for size, number in held if number == 1
    }  # no room for two
    save(elastic)
    for adapter in ("fold", "separate"):
        written = sizes_that_held(
            disk,
            range(8, 500, 120),
            lambda adapter=adapter: extract_checkpoint(elastic, "2x1/2", disk / "out", adapter=adapter),
        )
        assert 1 <= len(written) < 6
