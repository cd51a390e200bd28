"""SubnetStrategy: written by hand, and on disk: versioned, atomic, refused where it does not belong."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import JSON_NAME, TENSORS_NAME, DepthStrategy, SubnetStrategy
from amoeba_plugin.errors import ArtifactError, RecipeError
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.kept import Kept
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.runtime.files import write_atomically
from support.strategies import random_strategy

TinyModel = Callable[..., PreTrainedModel]


@pytest.fixture
def saved(tiny_model: TinyModel, tmp_path: Path) -> tuple[SubnetStrategy, Path]:
    strategy = random_strategy(tiny_model("llama"), bias_compensation=True)
    strategy.save(tmp_path)
    return strategy, tmp_path


def test_a_saved_strategy_loads_equal(saved: tuple[SubnetStrategy, Path]) -> None:
    strategy, directory = saved
    loaded = SubnetStrategy.load(directory)
    assert loaded.depth == strategy.depth
    assert loaded.fingerprint == strategy.fingerprint
    assert loaded.width.units == strategy.width.units
    assert loaded.width.bias_compensation
    for name in ("order", "mean_input"):
        expected, found = getattr(strategy.width, name), getattr(loaded.width, name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_depths_in_half_layers_are_saved_and_ask_for_a_newer_reader(tiny_model: TinyModel, tmp_path: Path) -> None:
    table = {"3": [0, "1.attention", "2.mlp", 3], "1.5": ["0.mlp", 3]}
    depth = replace(DepthStrategy.given(table, 4), metric={4: 1.0, 3: 1.5, 1.5: 2.0}, selector="one_shot")
    strategy = replace(random_strategy(tiny_model("llama")), depth=depth)
    strategy.save(tmp_path)
    loaded = SubnetStrategy.load(tmp_path)
    assert loaded.depth == depth
    assert [str(depth) for depth in loaded.space.depths] == ["4", "3", "1.5"]
    document = json.loads((tmp_path / JSON_NAME).read_text())
    assert document["version"] == 2
    assert document["depth"]["kept"] == {"4": [0, 1, 2, 3]} | table
    assert document["depth"]["metric"] == {"4": 1.0, "3": 1.5, "1.5": 2.0}


def test_whole_layers_are_written_as_they_always_were(saved: tuple[SubnetStrategy, Path]) -> None:
    document = json.loads((saved[1] / JSON_NAME).read_text())
    assert document["version"] == 1
    assert document["depth"]["kept"] == {"4": [0, 1, 2, 3], "3": [0, 2, 3], "2": [1, 3]}


def test_a_truncated_tensor_file_is_refused(saved: tuple[SubnetStrategy, Path]) -> None:
    tensors = saved[1] / TENSORS_NAME
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="truncated or of another strategy"):
        SubnetStrategy.load(saved[1])


def test_a_truncated_json_is_refused(saved: tuple[SubnetStrategy, Path]) -> None:
    document = saved[1] / JSON_NAME
    document.write_bytes(document.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="truncated or no JSON"):
        SubnetStrategy.load(saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a amoeba_plugin.SubnetStrategy file"),
        ({"version": 99}, "format version 99, this amoeba_plugin reads up to 3"),
        ({"depth": {"kept": {"a": []}, "objective": "", "metric": {}}}, "is damaged"),
    ],
)
def test_a_foreign_json_is_refused(saved: tuple[SubnetStrategy, Path], change: dict[str, object], message: str) -> None:
    path = saved[1] / JSON_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        SubnetStrategy.load(saved[1])


def test_a_directory_without_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        SubnetStrategy.load(tmp_path)


def test_a_strategy_of_another_model_is_refused(tiny_model: TinyModel) -> None:
    strategy = random_strategy(tiny_model("llama", seed=0))
    with pytest.raises(ArtifactError, match="belongs to a model with fingerprint"):
        ElasticModel(tiny_model("llama", seed=1), strategy)


def test_the_fingerprint_survives_a_change_of_dtype(tiny_model: TinyModel) -> None:
    model, adapter = tiny_model("llama"), architecture_for("llama")
    before = model_fingerprint(model, adapter)
    assert model_fingerprint(model.to(torch.bfloat16), adapter) == before


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_metric_that_overflowed_is_still_json(tiny_model: TinyModel, tmp_path: Path) -> None:
    strategy = random_strategy(tiny_model("llama"))
    replace(strategy, depth=replace(strategy.depth, metric={3: math.inf, 2: 1.5})).save(tmp_path)
    metric = SubnetStrategy.load(tmp_path).depth.metric
    assert json.loads((tmp_path / JSON_NAME).read_text())["depth"]["metric"] == {"3": None, "2": 1.5}
    assert math.isnan(metric[3])
    assert metric[2] == 1.5


@pytest.mark.parametrize("kept", [{"3": [0, 1]}, {"2": [1, 1]}, {"2": [0, 4]}, {"2": [-1, 0]}, {"two": [0, 1]}])
def test_layers_given_by_hand_must_be_layers(kept: dict[str, list[int]]) -> None:
    with pytest.raises(RecipeError, match="different layers out of 0..3"):
        DepthStrategy.given(kept, 4)


def test_layers_given_by_hand_are_ordered_and_the_whole_is_added() -> None:
    assert DepthStrategy.given({"2": [3, 0]}, 4).kept == {4: (0, 1, 2, 3), 2: (0, 3)}


@pytest.mark.parametrize(
    ("depth", "kept"),
    [("2.5", [0, 1]), ("2", [0, "1.mlp"]), ("1.5", [0, "4.mlp"]), ("1.5", [0, "0.mlp"]), ("1.4", [0]), ("0", [])],
)
def test_kept_layers_that_do_not_make_up_their_depth_are_refused(depth: str, kept: list[Kept]) -> None:
    with pytest.raises(RecipeError, match=f"depth {depth} keeps"):
        DepthStrategy.given({depth: kept}, 4)


@pytest.mark.parametrize("twice", ["2.0", " 2", "2.00"])
def test_one_depth_written_in_two_ways_is_refused(twice: str) -> None:
    with pytest.raises(RecipeError, match=f"kept_layers: '2' and '{twice}' are the same depth, 2"):
        DepthStrategy.given({"2": [0, 1], twice: [0, 3]}, 4)
