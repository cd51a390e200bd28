"""What belongs to an elastic checkpoint is written down, and whatever is missing, extra, half or another is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from amoeba_plugin.deployment.loads import require_loads
from amoeba_plugin.elastic import record
from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.testing.random_models import random_strategy
from support.checkpoints import record_anew, save_random
from support.models import random_elastic

TinyModel = Callable[..., PreTrainedModel]
WEIGHTS = "adapter/adapter_model.safetensors"
OLDER = Path(__file__).parent / "before_rooms"


@pytest.fixture
def checkpoint(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """An elastic checkpoint with a random adapter, its base beside it."""
    save_random(tiny_model("llama"), tmp_path)
    return tmp_path / "elastic"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_adapter(directory: Path) -> None:
    shutil.rmtree(directory / "adapter")


def halve_adapter(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file(dict(sorted(tensors.items())[::2]), directory / WEIGHTS)


def spoil_adapter(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    next(value for name, value in tensors.items() if name.endswith(".B")).view(-1)[-1] = torch.inf
    save_file(tensors, directory / WEIGHTS)


def pickle_adapter(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "adapter/adapter_model.bin")
    (directory / WEIGHTS).unlink()


def other_bytes(directory: Path) -> None:
    path = directory / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (drop_adapter, "lacks adapter/adapter_config.json, which was saved with it"),
    "missing strategy": (lambda where: (where / "strategy.safetensors").unlink(), "lacks strategy.safetensors"),
    "extra": (lambda where: (where / "adapter/adapter_model.bin").write_text(""), "adapter_model.bin does not belong"),
    "half": (halve_adapter, "adapter_model.safetensors has .* bytes, and was saved with"),
    "other": (other_bytes, "is not the file that was saved with this elastic checkpoint"),
    "another kind": (lambda where: change(where / "adapter/adapter_config.json", peft_type="LORA"), "adapter_config"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_refuses_what_is_not_whole(checkpoint: Path, damage: str, tmp_path: Path) -> None:
    spoil, message = DAMAGES[damage]
    spoil(checkpoint)
    with pytest.raises(ArtifactError, match=message):
        load_elastic(checkpoint)
    with pytest.raises(ArtifactError, match="strategy.safetensors" if damage == "missing strategy" else message):
        extract_checkpoint(checkpoint, "2x1/2", tmp_path / "out")
    with pytest.raises(ArtifactError, match=message):
        require_loads("2x1/2", str(tmp_path / "base"), "torch", strategy=checkpoint)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # PEFT's, of a configuration of another kind
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (halve_adapter, "lacks .* tensors, of which .*: it is not whole, or of another kind"),
        (spoil_adapter, "is not finite, for example base_model"),
        (pickle_adapter, "lacks adapter_model.safetensors"),
        (lambda where: change(where / "adapter/adapter_config.json", peft_type="LORA"), "another (kind|model)"),
    ],
)
def test_an_adapter_is_looked_at_whatever_is_written_down(
    checkpoint: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(checkpoint)
    record_anew(checkpoint)
    with pytest.raises(ArtifactError, match=message):
        load_elastic(checkpoint)


def test_what_hubs_and_people_add_is_let_be(checkpoint: Path) -> None:
    for name in (".gitattributes", "adapter/README.md", "adapter/.cache/huggingface/a.lock", "notes.txt"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("anything")
    assert load_elastic(checkpoint)[1] is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float13"}, "dtype: Input should be 'float32'"),
        ({"dtype": None}, "dtype"),
        ({"version": 3}, "format version 3, this amoeba_plugin reads up to 2"),
        ({"version": True}, "format version True"),
        ({"version": "2"}, "format version 2"),
        ({"files": None}, "names no files"),
        ({"files": {"../base/config.json": {"size": 1, "sha256": ""}}}, "lacks ../base/config.json"),
        ({"files": {"strategy.json": {"size": -1, "sha256": ""}}}, "size: Input should be greater"),
        ({"base_model": 3}, "base_model: Input should be a valid string"),
    ],
)
def test_an_elastic_json_of_other_values_is_refused(checkpoint: Path, values: dict[str, Any], message: str) -> None:
    change(checkpoint / "elastic.json", **values)
    with pytest.raises(ArtifactError, match=message):
        load_elastic(checkpoint)


def test_a_checkpoint_from_before_loads_and_one_line_says_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    record._tell_unrecorded.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load_elastic(OLDER / "elastic")
    assert [line.getMessage() for line in caplog.records if "older amoeba_plugin" in line.getMessage()] == [
        f"{OLDER / 'elastic'} was written by an older amoeba_plugin and does not say which files belong to it: what is "
        "missing would not be noticed; loading and saving it once (load_elastic, save_elastic) writes that down"
    ]


def test_a_trained_base_is_known_by_its_files_and_another_by_its_fingerprint(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    elastic = random_elastic(model)
    save_elastic(elastic, None, tmp_path / "elastic", str(tmp_path / "base"))
    with caplog.at_level(logging.WARNING):
        load_elastic(tmp_path / "elastic")
        assert "have other sizes" not in caplog.text
        tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
        (tmp_path / "base/model.safetensors").unlink()
        load_elastic(tmp_path / "elastic")
        assert "have other sizes" in caplog.text
    save_elastic(elastic, None, tmp_path / "trained", str(tmp_path / "base"), trained_base=True)
    load_elastic(tmp_path / "trained")
    (tmp_path / "trained/base/model-00001.safetensors").write_text("")
    with pytest.raises(ArtifactError, match="base/model-00001.safetensors does not belong"):
        load_elastic(tmp_path / "trained")
    (tmp_path / "trained/base/model-00001.safetensors").unlink()
    (tmp_path / "trained/base/generation_config.json").unlink()
    with pytest.raises(ArtifactError, match="lacks generation_config.json"):
        load_elastic(tmp_path / "trained")


STRATEGIES: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "no units": (("width", "units", "1/2", "0.mlp"), 0, "greater than 0"),
    "fewer than none": (("width", "units", "1/2", "0.mlp"), -3, "greater than 0"),
    "more than there are": (("width", "units", "1/2", "0.mlp"), 10**6, "keeps 1000000 units of 0.mlp, which has"),
    "half a unit": (("width", "units", "1/2", "0.mlp"), 1.5, "valid integer"),
    "true": (("width", "units", "1/2", "0.mlp"), True, "valid integer"),
    "missing": (("width", "units", "1/2"), {"0.mlp": 3}, "width 1/2 says nothing of"),
    "no width 1": (("width", "units"), {}, "there is no width 1"),
    "a width of too many digits": (("width", "units", "1e-999999999"), {}, "is no number"),
    "no depths": (("depth", "kept"), {}, "at least 1 item"),
    "a depth of other layers": (("depth", "kept", "3"), [0, 1], "depth 3 keeps layers"),
    "layers there are not": (("depth", "kept", "2"), [0, 9], "depth 2 keeps layers"),
    "a part of the largest": (
        ("depth", "kept"),
        {"2.5": [0, 1, "2.mlp"]},
        "the largest depth, 2.5, is not the whole model",
    ),
    "a boolean as text": (("width", "bias_compensation"), "no", "valid boolean"),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_a_strategy_of_other_values_is_refused(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    keys, value, message = STRATEGIES[case]
    random_strategy(tiny_model("llama")).save(tmp_path)
    path = tmp_path / "strategy.json"
    document = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=f"strategy.json is damaged .*{message}"):
        SubnetStrategy.load(tmp_path)
