"""One plain LoRA for all shapes, and no adapter at all: trained, saved, loaded, extracted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, TrainingArguments

from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import AdapterError, ArchitectureError, ArtifactError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from support.checkpoints import record_anew
from support.models import logits_at, random_elastic

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.arange(1, 11)[None]


def lora(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": "all-linear"} | fields)


def train(elastic: ElasticModel, model: PreTrainedModel | PeftModel, directory: Path) -> None:
    rows = torch.randint(97, (8, 12), generator=torch.Generator().manual_seed(2))
    arguments = TrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=2,
        per_device_train_batch_size=4, learning_rate=0.01, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    train_one_for_all(elastic, model, dataset, OneForAllOptions(), arguments)


def test_a_lora_follows_every_shape(tiny_model: TinyModel, tmp_path: Path) -> None:
    elastic = random_elastic(tiny_model("llama"))
    model = attach_lora(elastic, lora()).eval()
    before = {name: value.clone() for name, value in model.named_parameters()}
    train(elastic, model, tmp_path)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    for shape in elastic.space:  # extraction adds s * B A to the whole weight and cuts it
        with torch.no_grad():
            expected = extract(elastic, shape)(TOKENS).logits
        torch.testing.assert_close(logits_at(elastic, shape, TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_a_trained_lora_comes_back_from_its_elastic_checkpoint(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    elastic = random_elastic(base)
    model = attach_lora(elastic, lora()).eval()
    save_elastic(elastic, model, tmp_path / "elastic", str(tmp_path / "base"))
    loaded, peft_model = load_elastic(tmp_path / "elastic")
    assert peft_model is not None
    assert json.loads((tmp_path / "elastic/adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    for shape in elastic.space:
        assert torch.equal(logits_at(loaded, shape, TOKENS), logits_at(elastic, shape, TOKENS))
    parity = extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "out")
    assert parity.max_logit_difference <= 1e-4


def test_a_trained_base_is_kept_whole_and_needs_no_other(tiny_model: TinyModel, tmp_path: Path) -> None:
    elastic = random_elastic(tiny_model("llama"))
    untrained = {str(shape): logits_at(elastic, shape, TOKENS) for shape in elastic.space}
    train(elastic, elastic.model, tmp_path)
    save_elastic(elastic, None, tmp_path / "elastic", "a base that is gone", trained_base=True)
    loaded, peft_model = load_elastic(tmp_path / "elastic")
    assert peft_model is None
    for shape in elastic.space:
        assert torch.equal(logits_at(loaded, shape, TOKENS), logits_at(elastic, shape, TOKENS))
        assert not torch.allclose(logits_at(loaded, shape, TOKENS), untrained[str(shape)], atol=1e-3)
    parity = extract_checkpoint(tmp_path / "elastic", "2x3/4", tmp_path / "out")
    assert parity.max_logit_difference <= 1e-4


def test_biases_for_missing_channels_and_a_trained_base_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    elastic = random_elastic(tiny_model("llama"), bias_compensation=True)
    with pytest.raises(ArchitectureError, match="bias_compensation: false, or train an adapter"):
        save_elastic(elastic, None, tmp_path / "elastic", "base", trained_base=True)
    assert not list(tmp_path.iterdir())


def test_dora_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(AdapterError, match="use_dora=False"):
        attach_lora(random_elastic(tiny_model("llama")), lora(use_dora=True))


def test_an_adapter_of_another_space_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    elastic = random_elastic(base)
    model = attach_smol(elastic, SmolConfig(r=2, num_experts=2, target_modules="all-linear"))
    save_elastic(elastic, model, tmp_path / "elastic", str(tmp_path / "base"))
    path = tmp_path / "elastic/adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"widths": ["1", "7/8", "1/2"]}))
    record_anew(tmp_path / "elastic")
    with pytest.raises(ArtifactError, match="was trained for"):
        load_elastic(tmp_path / "elastic")
