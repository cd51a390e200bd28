"""What a subnet goes without, or cannot have, is said: in a line of the log, in its card, or by a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.errors import ArchitectureError, ArtifactError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.runtime.model_files import load_config
from amoeba_plugin.testing.random_models import attach_random_smol
from support.checkpoints import record_anew
from support.models import logits, logits_at, make_tiny_model, random_elastic, require_close, save_base

TinyModel = Callable[..., PreTrainedModel]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An elastic checkpoint in ``tmp_path/elastic``, its base with a tokenizer in ``tmp_path/base``."""
    elastic = random_elastic(make_tiny_model("llama"))
    save_base(elastic.model, tmp_path / "base")
    elastic = random_elastic(make_tiny_model("llama"))
    save_elastic(elastic, attach_random_smol(elastic), tmp_path / "elastic", str(tmp_path / "base"))
    save_base(make_tiny_model("llama"), tmp_path / "base")
    return tmp_path


def told(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "{}", '{"model": 3}', "\x80"])
def test_a_missing_or_damaged_tokenizer_is_told_once(saved: Path, text: str | None, caplog: pytest.LogCaptureFixture):
    path = saved / "base/tokenizer.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    extract_checkpoint(saved / "elastic", "2x1/2", saved / "out")
    (line,) = told(caplog, "tokenizer")
    assert line.startswith("no tokenizer is written beside the checkpoint: the model '")
    assert len(line) < 700
    assert not (saved / "out/tokenizer.json").exists()


@pytest.mark.parametrize("text", ["", "{", '{"eos_token_id": 7', "never"])
def test_defaults_of_generation_that_are_no_json_are_told_once(
    saved: Path, text: str, caplog: pytest.LogCaptureFixture
):
    (saved / "base/generation_config.json").write_text(text)
    extract_checkpoint(saved / "elastic", "2x1/2", saved / "out")
    assert len(told(caplog, "generation_config.json is no JSON and is passed over")) == 1


@pytest.mark.parametrize("text", ["[]", "null", '{"max_new_tokens": -3}'])
def test_defaults_of_generation_that_keep_a_model_from_loading_are_refused(saved: Path, text: str):
    (saved / "base/generation_config.json").write_text(text)
    with pytest.raises(ArtifactError, match="generation_config.json is damaged"):
        load_elastic(saved / "elastic")


def test_nothing_is_told_of_a_whole_base(saved: Path, caplog: pytest.LogCaptureFixture):
    extract_checkpoint(saved / "elastic", "2x1/2", saved / "out")
    assert not caplog.records
    assert (saved / "out/tokenizer.json").exists()


def test_tensors_of_an_adapter_that_no_module_has_are_told(saved: Path, caplog: pytest.LogCaptureFixture):
    path = saved / "elastic/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.model.layers.9.mlp.up_proj.smol_A": torch.ones(2)}, path)
    record_anew(saved / "elastic")
    load_elastic(saved / "elastic")
    (line,) = told(caplog, "adapter")
    assert line.startswith("1 tensors of the adapter in ")
    assert "layers.9.mlp.up_proj.smol_A" in line


def test_an_adapter_of_a_method_that_follows_no_shape_is_refused(saved: Path, tiny_model: TinyModel):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(saved / "elastic/adapter")
    record_anew(saved / "elastic")
    with pytest.raises(ArtifactError, match="is of PEFT's method .*IA3, which does not follow"):
        load_elastic(saved / "elastic")


def test_a_lora_on_untied_embeddings_is_folded_in(tiny_model: TinyModel):
    elastic = random_elastic(tiny_model("llama"))
    fields = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    attach_lora(elastic, LoraConfig(target_modules=["embed_tokens", "q_proj"], **fields))
    for shape in (elastic.space.largest, elastic.space.smallest):
        require_close(logits(extract(elastic, shape)), logits_at(elastic, shape), 1e-4)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules=["lm_head"], use_dora=True), "use_dora or lora_bias"),
        (LoraConfig(target_modules=["lm_head"], lora_bias=True), "use_dora or lora_bias"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "cannot be added to it"),
    ],
    ids=["DoRA", "biases", "IA3"],
)
def test_an_adapter_that_is_no_sum_of_weights_is_not_folded_in(tiny_model: TinyModel, config: PeftConfig, words: str):
    elastic = random_elastic(tiny_model("llama"))
    get_peft_model(elastic.model, config)
    with pytest.raises(ArchitectureError, match=words):
        extract(elastic, elastic.space.largest)


def test_a_model_with_an_adapter_beside_it_is_refused(saved: Path, tiny_model: TinyModel):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(saved / "base")
    with pytest.raises(ArchitectureError, match="has a PEFT adapter beside it"):
        load_config(str(saved / "base"))


@pytest.mark.parametrize("compensated", [True, False])
def test_a_subnet_that_cannot_be_cut_again_says_so(tiny_model: TinyModel, tmp_path: Path, compensated: bool):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    save_elastic(
        random_elastic(model, bias_compensation=compensated), None, tmp_path / "elastic", str(tmp_path / "base")
    )
    extract_checkpoint(tmp_path / "elastic", "2x1/2", tmp_path / "out")
    assert (json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "seed_oss") == compensated
    said = "seed_oss, the class that holds it, is no architecture that can be cut: cut other shapes from the elastic"
    assert (f"| cut again | no, {said}" in (tmp_path / "out/README.md").read_text()) == compensated
    arguments = [
        "loads",
        "2x1/2",
        "--model",
        tmp_path / "base",
        "--flow",
        "torch",
        "--strategy",
        tmp_path / "elastic",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0
    assert (f"it cannot be cut again, {said}" in result.stderr) == compensated
