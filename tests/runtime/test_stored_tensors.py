"""Which file a tensor is read from: the one that transformers takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.stored_tensors import CheckpointTensors
from amoeba_plugin.runtime.whole_weights import require_weights
from support.models import make_tiny_model

INDEX = "model.safetensors.index.json"


def add_stale_index(directory: Path) -> None:
    """Leave beside a model's file the index and the shard of another one, as an earlier save may have."""
    tensors = load_file(directory / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, directory / "old.safetensors", {"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "old.safetensors")}))


def test_a_stale_index_beside_a_single_file_is_passed_over(tmp_path: Path) -> None:
    make_tiny_model("llama").save_pretrained(tmp_path)
    add_stale_index(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    tensors = CheckpointTensors.find(str(tmp_path))
    assert tensors is not None
    read = tensors.read(tensors, torch.float32)
    assert read.keys() == loaded.keys()
    assert all(torch.equal(read[key], loaded[key]) for key in read)
    require_weights(str(tmp_path))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / INDEX).is_file()
    tensors = CheckpointTensors.find(str(tmp_path))
    assert tensors is not None
    read = tensors.read(tensors, torch.float32)
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    make_tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ArtifactError, match="is truncated or no index of weights"):
        require_weights(str(tmp_path))
