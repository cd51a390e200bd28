"""One-for-all training on a base that bitsandbytes keeps in four bits (QLoRA), from loading to a subnet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainingArguments

import amoeba_plugin  # noqa: F401  # registers the modifiers
from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.elastic.linear import PackedElasticLinear
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import AdapterError, ArchitectureError, ArtifactError, RecipeError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.packed_linear import dense_weight
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.modifiers import OneForAllDistillationModifier, TrainingEventsCallback, begin_session
from support.batches import tensor_rows
from support.models import logits, require_close, save_base
from support.recipes import GIVEN_DEPTHS, TRAIN_FIELDS, SessionTrainer, run_on_rows, training_recipe
from support.strategies import random_strategy
from support.training import attach_adapter, require_equal_training, train_by_large_steps

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
TinyModel = Callable[..., PreTrainedModel]
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
EIGHT = BitsAndBytesConfig(load_in_8bit=True)


pytestmark = pytest.mark.usefixtures("fresh_session")


def load(base: Path, config: BitsAndBytesConfig = FOUR) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    for module in model.modules():  # a kernel for CPUs in evaluation that rounds to bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def dequantized(base: Path) -> Any:
    return load(base).dequantize().eval()


def test_every_shape_computes_what_the_dequantized_weights_do(base: Path) -> None:
    model, reference = load(base), dequantized(base)
    strategy = random_strategy(reference, bias_compensation=True)
    weight = reference.model.layers[1].mlp.down_proj.weight.detach().clone()
    assert torch.equal(dense_weight(model.model.layers[1].mlp.down_proj), weight)
    packed, dense = ElasticModel(model, strategy), ElasticModel(reference, strategy)
    linear = packed.layers[1].mlp.down_proj
    assert isinstance(linear, PackedElasticLinear)
    assert isinstance(linear, bitsandbytes.nn.Linear4bit)
    stored = linear.weight.detach().clone()
    for shape in packed.space:
        with packed.active(shape) as one, dense.active(shape) as other:
            require_close(logits(one), logits(other), 1e-4)
    assert linear.weight.dtype == torch.uint8
    assert torch.equal(linear.weight, stored)
    packed.release()
    assert type(linear) is bitsandbytes.nn.Linear4bit
    assert torch.equal(dense_weight(linear), weight)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_eight_bits_compute_what_masks_compute(base: Path) -> None:
    """Eight-bit products round the activations too, so that no dense weight gives the same."""
    model, masked = load(base, EIGHT), load(base, EIGHT)
    strategy, adapter = random_strategy(model), architecture_for("llama")
    elastic, width = ElasticModel(model, strategy), strategy.space.widths[1]
    for index, layer in enumerate(masked.model.layers):
        for group in adapter.channel_groups(masked.config):
            key = f"{index}.{group.name}"
            kept = group.consumer.channels(strategy.width.order[key][: strategy.width.units[width][key]])
            mask = torch.zeros(group.channels).index_fill(0, kept, 1.0)
            layer.get_submodule(group.consumer.path).register_forward_pre_hook(
                lambda _m, args, mask=mask: args[0] * mask
            )
    masked.model.layers = nn.ModuleList([masked.model.layers[index] for index in GIVEN_DEPTHS["3"]])
    masked.config.num_hidden_layers = 3
    with elastic.active(f"3x{width}") as active:
        require_close(logits(active), logits(masked), 1e-2)


@pytest.mark.parametrize("kind", ["smol", "lora"])
def test_trained_saved_and_cut(base: Path, tmp_path: Path, kind: str) -> None:
    strategy = random_strategy(AutoModelForCausalLM.from_pretrained(base))  # selected on the full model
    packed, dense = ElasticModel(load(base), strategy), ElasticModel(model := dequantized(base), random_strategy(model))
    found, expected = attach_adapter(packed, kind), attach_adapter(dense, kind)
    for elastic, model in ((packed, found), (dense, expected)):
        train_by_large_steps(elastic, model, tmp_path)
        model.eval()
    require_equal_training(found, expected, 1e-4)

    save_elastic(packed, found, tmp_path / "elastic", str(base))
    full, loaded = load_elastic(tmp_path / "elastic")
    assert loaded is not None
    assert not full.packed
    for name, value in found.state_dict().items():
        if "smol_" in name or "lora_" in name:
            assert torch.equal(loaded.state_dict()[name], value), name
    parity = extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "of_full")
    assert parity.max_logit_difference < 1e-4

    with packed.active("3x1/2") as active:
        served = logits(active)
    require_close(logits(extract(packed, "3x1/2")), served, 1e-4)
    save_base(dequantized(base), tmp_path / "dequantized")
    with pytest.raises(ArtifactError, match="belongs to a model with fingerprint"):
        extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "refused", base=str(tmp_path / "dequantized"))


def test_a_base_selected_and_trained_in_four_bits_is_cut_from_either_base(base: Path, tmp_path: Path) -> None:
    elastic = ElasticModel(load(base), random_strategy(load(base)))
    model = attach_adapter(elastic, "smol")
    train_by_large_steps(elastic, model, tmp_path)
    model.eval()
    with elastic.active("3x1/2") as active:
        served = logits(active)
    save_elastic(elastic, model, tmp_path / "elastic", str(base))
    save_base(dequantized(base), tmp_path / "dequantized")
    for name, tolerance in (("base", None), ("dequantized", 1e-4)):
        extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / f"of_{name}", base=str(tmp_path / name))
        subnet = AutoModelForCausalLM.from_pretrained(tmp_path / f"of_{name}")
        if tolerance is None:
            assert (logits(subnet) - served).abs().max() > 1e-2  # the adapter has learned beside other weights
        else:
            require_close(logits(subnet), served, tolerance)


def test_the_base_itself_cannot_be_trained(base: Path, tmp_path: Path) -> None:
    elastic = ElasticModel(load(base), random_strategy(load(base)))
    with pytest.raises(ArchitectureError, match="cannot be trained; put an adapter on it"):
        OneForAllDistillationModifier(adapter="none").attach(elastic)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        elastic.model.lm_head.requires_grad_(True)
        train_by_large_steps(elastic, elastic.model, tmp_path)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("config", "tolerance"), [(FOUR, 1e-4), (EIGHT, 0.1)])
def test_an_elastic_checkpoint_of_a_base_saved_quantized(
    base: Path, tmp_path: Path, config: BitsAndBytesConfig, tolerance: float
) -> None:
    """Its files hold integers, in eight bits under the names and in the shapes of dense weights."""
    save_base(load(base, config), tmp_path / "packed")
    elastic = ElasticModel(model := load(base, config), random_strategy(model))
    save_elastic(elastic, attach_adapter(elastic, "smol"), tmp_path / "elastic", str(tmp_path / "packed"))
    extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "subnet")
    subnet = AutoModelForCausalLM.from_pretrained(tmp_path / "subnet")
    assert type(subnet.model.layers[0].mlp.up_proj) is nn.Linear
    with elastic.active("3x1/2") as active:
        served = logits(active)
    assert (logits(subnet) - served).abs().mean() < tolerance * served.std()


@pytest.mark.parametrize("config", [FOUR, EIGHT])
@pytest.mark.parametrize("kind", ["smol", "lora"])
@pytest.mark.filterwarnings("ignore:Merge lora module to")
def test_merging_into_weights_of_another_order_is_refused(base: Path, kind: str, config: BitsAndBytesConfig) -> None:
    elastic = ElasticModel(model := load(base, config), random_strategy(model))
    adapter = attach_adapter(elastic, kind)
    stored = {name: parameter.clone() for name, parameter in adapter.named_parameters()}
    for merge in (adapter.merge_adapter, adapter.merge_and_unload):
        with pytest.raises(AdapterError, match="keeps its weight packed, so that no adapter .* can be merged into it"):
            merge()
    assert stored.keys() == dict(adapter.named_parameters()).keys()
    assert all(torch.equal(parameter, stored[name]) for name, parameter in adapter.named_parameters())


def test_a_recipe_that_extracts_runs_on_it(base: Path, tmp_path: Path) -> None:
    text = training_recipe(tmp_path / "elastic", {"SubnetExtractionModifier": {"shape": "3x1/2"}})
    subnet = run_on_rows(load(base), text)
    assert {type(module) for module in subnet.model.layers.modules() if "Linear" in type(module).__name__} == {
        nn.Linear
    }
    strategy = load_elastic(tmp_path / "elastic")[0].strategy
    elastic = ElasticModel(load(base), strategy)
    model = OneForAllDistillationModifier(**TRAIN_FIELDS).attach(elastic)
    assert model is not None
    model.load_adapter(tmp_path / "elastic/adapter", "trained")
    model.set_adapter("trained")
    with elastic.active("3x1/2") as active:
        model.set_shape("3x1/2")
        require_close(logits(subnet), logits(active.eval()), 1e-4)


def test_a_recipe_that_would_leave_it_packed_is_refused_before_anything_runs(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="q_proj keeps its weight packed, which llm-compressor cannot move"):
        run_on_rows(load(base), training_recipe(tmp_path / "elastic"))
    assert not (tmp_path / "elastic").exists()


def test_a_trainer_of_its_own_trains_the_recipe(base: Path, tmp_path: Path) -> None:
    text = training_recipe(tmp_path / "elastic")
    model = begin_session(text, load(base), DataLoader(tensor_rows(), batch_size=4), tensor_rows())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "scratch"), max_steps=2, per_device_train_batch_size=2, report_to=[],
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    SessionTrainer(
        model=model, args=arguments, train_dataset=tensor_rows(), data_collator=PaddingCollator(),
        callbacks=[TrainingEventsCallback()],
    ).train()  # fmt: skip
    _, trained = load_elastic(tmp_path / "elastic")
    assert trained is not None
    assert any(bool(value.any()) for name, value in trained.named_parameters() if name.endswith("default.B"))
