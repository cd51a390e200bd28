"""Weights that are not whole are refused by name, wherever a model is loaded; whole ones of every architecture pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.errors import AmoebaError, ArtifactError
from amoeba_plugin.runtime.whole_weights import require_weights
from support.models import random_elastic, tiny_llama

Tensors = dict[str, Tensor]
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
RECIPE = """
select_stage:
  pick_modifiers:
    WidthShrinkingModifier: {widths: ["1", "1/2"], allocation: uniform, importance: magnitude}
  cut_modifiers:
    SubnetExtractionModifier: {shape: 4x1/2}
"""


def without(*lost: str) -> Callable[[Tensors], Tensors]:
    return lambda whole: {name: value for name, value in whole.items() if name not in lost}


def change(base: Path, changed: Callable[[Tensors], Tensors]) -> None:
    path = base / "model.safetensors"
    save_file(changed(load_file(path)), path, {"format": "pt"})


def write_config(base: Path, **fields: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    save_elastic(random_elastic(model), None, tmp_path / "elastic", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.mark.parametrize("lost", [HEAD, EMBEDDING, NORM, "model.layers.2.mlp.up_proj.weight"])
def test_every_door_refuses_weights_that_lack_a_parameter(base: Path, tmp_path: Path, lost: str) -> None:
    change(base, without(lost))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe, out = str(tmp_path / "recipe.yaml"), str(tmp_path / "out")
    for command in (
        ["check", recipe, "--model", str(base)],
        ["run", recipe, "--model", str(base), "-o", out],
        ["extract", str(tmp_path / "elastic"), "--shape", "2x1/2", "-o", out],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2, command
        assert f"lack {lost}, which transformers would fill with random" in " ".join(done.output.split())
    with pytest.raises(ArtifactError, match=lost):
        load_elastic(tmp_path / "elastic")  # to train on
    assert not Path(out).exists()


def test_what_several_lack_is_counted(base: Path) -> None:
    change(base, lambda whole: {name: value for name, value in whole.items() if "layers.1." not in name})
    with pytest.raises(ArtifactError, match=r"layers\.1\.\S+, \S+, \S+ and 6 more, which"):
        require_weights(str(base))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"intermediate_size": 40}, r"mlp.down_proj.weight is \(32, 48\), not \(32, 40\)"),
        ({"num_hidden_layers": 5}, r"lack model.layers.4."),
        ({"vocab_size": 60}, r"lm_head.weight is \(61, 32\), not \(60, 32\)"),
    ],
)
def test_a_config_of_other_sizes_is_refused(base: Path, fields: dict[str, int], told: str) -> None:
    write_config(base, **fields)
    with pytest.raises(ArtifactError, match=told):
        require_weights(str(base))


def test_a_base_without_a_config_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "config.json").unlink()
    with pytest.raises(AmoebaError, match=r"config\.json"):
        load_elastic(tmp_path / "elastic")


def test_one_matrix_of_two_tied_ones_is_enough(base: Path) -> None:
    write_config(base, tie_word_embeddings=True)
    for lost in (HEAD, EMBEDDING):
        whole = load_file(base / "model.safetensors")
        change(base, without(lost))
        require_weights(str(base))
        save_file(whole, base / "model.safetensors", {"format": "pt"})
    change(base, without(HEAD, EMBEDDING))
    with pytest.raises(ArtifactError, match=f"lack {HEAD}, {EMBEDDING}"):
        require_weights(str(base))


def test_tied_matrices_that_differ_are_refused(base: Path) -> None:
    """transformers unties them; the configuration of a subnet would still tie them."""
    write_config(base, tie_word_embeddings=True)
    with pytest.raises(ArtifactError, match="say tie_word_embeddings: false there"):
        require_weights(str(base))
    change(base, lambda whole: whole | {HEAD: whole[EMBEDDING].clone()})
    require_weights(str(base))


def test_tensors_that_no_parameter_wants_are_legal(base: Path) -> None:
    """Older files hold rotary frequencies of every layer."""
    change(base, lambda whole: whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    require_weights(str(base))


def test_other_formats_are_looked_at(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    require_weights(str(base))
    torch.save(without(NORM)(tensors), base / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=NORM):
        require_weights(str(base))
