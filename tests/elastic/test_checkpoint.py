"""Elastic checkpoints: any shape out of one directory, refused where anything is missing or foreign."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.elastic import record
from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import AdapterError, ArtifactError, ShapeError
from amoeba_plugin.extraction import checkpoint as checkpoint_extraction
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.smol import SmolConfig
from support.checkpoints import record_anew, save_random
from support.models import logits_at, random_elastic, tiny_llama

TinyModel = Callable[..., PreTrainedModel]


@pytest.fixture
def elastic(tiny_model: TinyModel, tmp_path: Path) -> ElasticModel:
    """An elastic model with a random adapter, saved in ``tmp_path/elastic``, its base in ``tmp_path/base``."""
    return save_random(tiny_model("llama"), tmp_path)


def test_a_loaded_checkpoint_computes_the_same_at_every_shape(elastic: ElasticModel, tmp_path: Path) -> None:
    tokens = torch.arange(10)[None]
    loaded, peft_model = load_elastic(tmp_path / "elastic")
    assert peft_model is not None
    for shape in elastic.space:
        assert torch.equal(logits_at(loaded, shape, tokens), logits_at(elastic, shape, tokens))


def test_any_shape_is_extracted_with_its_parity(elastic: ElasticModel, tmp_path: Path) -> None:
    parity = extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "out")
    assert parity.max_logit_difference <= 1e-4
    assert json.loads((tmp_path / "out/parity.json").read_text())["shape"] == "3x1/2"
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(found, logits_at(elastic, "3x1/2", tokens), atol=1e-4, rtol=0)


def test_a_base_that_moved_is_named(elastic: ElasticModel, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="there is no such directory. Say where it is with --base"):
        load_elastic(tmp_path / "elastic")
    loaded, _ = load_elastic(tmp_path / "elastic", base=str(tmp_path / "moved"))
    assert loaded.space == elastic.space


def test_a_tree_that_moved_as_a_whole_finds_its_base(
    elastic: ElasticModel, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "out")
    moved = tmp_path_factory.mktemp("elsewhere") / "tree"
    moved.mkdir()
    for name in ("base", "elastic"):
        (tmp_path / name).rename(moved / name)
    monkeypatch.chdir(moved.parent)  # the elastic checkpoint named as a user would, relative to where they are
    parity = extract_checkpoint(Path("tree/elastic"), "3x1/2", tmp_path / "again")
    assert parity == before
    (moved / "base").rename(moved / "other")
    with pytest.raises(ArtifactError, match="there is no such directory. Say where it is with --base"):
        load_elastic(moved / "elastic")


def test_a_base_from_a_hub_has_no_place_beside_the_checkpoint(elastic: ElasticModel, tmp_path: Path) -> None:
    save_elastic(elastic, None, tmp_path / "hub", "somebody/a-model")
    assert "base_model_from_here" not in json.loads((tmp_path / "hub/elastic.json").read_text())


def test_another_base_is_refused(elastic: ElasticModel, tiny_model: TinyModel, tmp_path: Path) -> None:
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="belongs to a model with fingerprint"):
        load_elastic(tmp_path / "elastic", base=str(tmp_path / "other"))


def test_an_adapter_of_another_model_or_choice_of_layers_is_refused(elastic: ElasticModel, tmp_path: Path) -> None:
    path = tmp_path / "elastic/adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"kept_layers": config["kept_layers"] | {"2": [0, 1]}}))
    record_anew(tmp_path / "elastic")
    with pytest.raises(ArtifactError, match="was trained with other layers kept"):
        load_elastic(tmp_path / "elastic")
    larger = tiny_llama(hidden_size=64)
    attach_smol(random_elastic(larger), SmolConfig(r=4, num_experts=3, target_modules="all-linear")).save_pretrained(
        str(tmp_path / "elastic/adapter")
    )
    record_anew(tmp_path / "elastic")
    with pytest.raises(ArtifactError, match="is damaged or of another model"):
        load_elastic(tmp_path / "elastic")


def test_a_shape_outside_is_refused_before_the_base_is_loaded(
    elastic: ElasticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_extraction, "load_elastic", None)
    with pytest.raises(ShapeError, match="outside the space"):
        extract_checkpoint(tmp_path / "elastic", "4x1/4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", ["elastic.json", "strategy.json", "strategy.safetensors", "adapter/adapter_model.safetensors"]
)
def test_a_truncated_file_is_refused(elastic: ElasticModel, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "elastic" / damage
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ArtifactError):
        load_elastic(tmp_path / "elastic")


@pytest.mark.parametrize(
    ("output", "shard", "message"),
    [
        ("elastic/subnet", "5GB", "is inside the elastic checkpoint"),
        ("base/config.json/subnet", "5GB", "config.json/subnet cannot be written"),
        ("subnet", "big", "max_shard_size 'big' is no size of a file"),
        ("subnet", "0", "max_shard_size '0' is no size of a file"),
        ("subnet", "0GB", "max_shard_size '0GB' is no size of a file"),
        ("subnet", "-5GB", "max_shard_size '-5GB' is no size of a file"),
        ("subnet", "infGB", "max_shard_size 'infGB' is no size of a file"),
        ("elastic/elastic.json", "5GB", "elastic.json exists and is no directory; nothing is overwritten"),
    ],
)
@pytest.mark.usefixtures("elastic")
def test_where_and_how_large_is_checked_first(tmp_path: Path, output: str, shard: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / output, max_shard_size=shard)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "elastic"]
    assert not (tmp_path / "elastic/subnet").exists()


def test_an_output_that_holds_something_else_is_left_alone(elastic: ElasticModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="nothing is overwritten"):
        extract_checkpoint(tmp_path / "elastic", "2x1", tmp_path / "out")
    with pytest.raises(ArtifactError, match="nothing is overwritten"):
        save_elastic(elastic, None, tmp_path / "out", "base")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_save_that_fails_leaves_the_old_checkpoint(
    elastic: ElasticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.stat().st_size for path in (tmp_path / "elastic").iterdir()}

    def no_space(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_atomically", no_space)
    with pytest.raises(ArtifactError, match="is full; nothing was kept"):
        save_elastic(elastic, None, tmp_path / "elastic", "elsewhere")
    assert {path.name: path.stat().st_size for path in (tmp_path / "elastic").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "elastic"]


def test_the_active_adapter_is_kept_whatever_its_name(elastic: ElasticModel, tmp_path: Path) -> None:
    """Not the one that PEFT calls default, beside it."""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live = ElasticModel(model, elastic.strategy)
    config = SmolConfig(r=2, num_experts=2, init_weights=False, target_modules="all-linear")
    peft_model = attach_smol(live, config).eval()
    peft_model.add_adapter("second", dataclasses.replace(config, r=3))
    peft_model.set_adapter("second")
    save_elastic(live, peft_model, tmp_path / "second", str(tmp_path / "base"))
    assert sorted(path.name for path in (tmp_path / "second/adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    loaded, _ = load_elastic(tmp_path / "second")
    tokens = torch.arange(10)[None]
    live.set_shape("3x1/2")  # the second adapter's router has to be told
    assert torch.equal(logits_at(loaded, "3x1/2", tokens), logits_at(live, "3x1/2", tokens))
    peft_model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="holds one adapter, and default, second are active"):
        save_elastic(live, peft_model, tmp_path / "both", str(tmp_path / "base"))
    assert not (tmp_path / "both").exists()


def test_without_an_adapter_the_strategy_alone_is_kept(elastic: ElasticModel, tmp_path: Path) -> None:
    save_elastic(elastic, None, tmp_path / "bare", str(tmp_path / "base"))
    loaded, peft_model = load_elastic(tmp_path / "bare")
    assert peft_model is None
    assert loaded.space == elastic.space
