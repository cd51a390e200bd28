"""Repaired weights in an elastic model: switched by pointer, stored, trained, kept beside packed weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
from amoeba_plugin.elastic.linear import ElasticLinear
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import Repairs
from amoeba_plugin.elastic.strategy import JSON_NAME, SubnetStrategy
from amoeba_plugin.errors import AdapterError, ArtifactError
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.testing.random_models import attach_random_smol, random_model, random_repairs
from support.architectures import CONFIGS
from support.models import logits, logits_at, require_close
from support.packed_linears import pack, unpack
from support.strategies import random_strategy, uneven_strategy
from support.training import make_trainer

TinyModel = Callable[..., PreTrainedModel]
HALF = Fraction(1, 2)


def repaired_strategy(model: PreTrainedModel, strategy: SubnetStrategy | None = None) -> SubnetStrategy:
    strategy = strategy or random_strategy(model)
    return replace(strategy, repairs=random_repairs(model, strategy))


@pytest.fixture
def elastic(tiny_model: TinyModel) -> ElasticModel:
    model = tiny_model("llama")
    return ElasticModel(model, repaired_strategy(model))


def test_a_strategy_keeps_its_repaired_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    strategy = repaired_strategy(tiny_model("llama"))
    strategy.save(tmp_path)
    document = json.loads((tmp_path / JSON_NAME).read_text())
    assert (document["version"], document["repair"]) == (3, "random")
    found = SubnetStrategy.load(tmp_path).repairs
    assert found.weights.keys() == strategy.repairs.weights.keys()
    for place, held in strategy.repairs.weights.items():
        assert found.weights[place].keys() == held.keys()
        assert all(torch.equal(found.weights[place][key], each) for key, each in held.items())
    kept = [4 * (96 + 96), 4 * (64 + 64), 4 * (128 + 128), 4 * (64 + 64)]  # channels of 4 layers at 3/4, 1/2, 1, 1/2
    assert found.bytes == 4 * 64 * sum(kept)


def test_names_of_half_layers_and_experts_come_back() -> None:
    weight = torch.ones(2, 3)
    repairs = Repairs({(10.5, HALF): {"3.mlp.7": weight}, (None, Fraction(3, 4)): {"11.attention": weight}}, "by hand")
    assert set(repairs.tensors()) == {"10.5x1/2.3.mlp.7", "everyx3/4.11.attention"}
    assert Repairs.stored(repairs.tensors(), "by hand") == repairs


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("everyx1/3.0.mlp", torch.ones(64, 64), "repaired for everyx1/3, which is not in the space"),
        ("9x1/2.0.mlp", torch.ones(64, 64), "repaired for 9x1/2"),
        ("everyx1/2.9.mlp", torch.ones(64, 64), "9.mlp is no matrix of a group"),
        ("everyx1/2.0.mlp", torch.ones(64), "0.mlp is no matrix"),
        ("everyx1/2.0.mlp", torch.ones(64, 64, dtype=torch.int64), "0.mlp is no matrix"),
        ("everyx1/2.0.mlp", torch.full((64, 64), torch.nan), "0.mlp is not finite"),
        ("half.0.mlp", torch.ones(64, 64), "is damaged"),
    ],
)
def test_a_repaired_weight_that_belongs_nowhere_is_refused(
    tiny_model: TinyModel, tmp_path: Path, name: str, weight: torch.Tensor, message: str
) -> None:
    class Named(Repairs):
        def tensors(self) -> dict[str, torch.Tensor]:
            return {name: weight}

    strategy = repaired_strategy(tiny_model("llama"))
    replace(strategy, repairs=Named(strategy.repairs.weights, "by hand")).save(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        SubnetStrategy.load(tmp_path)


def test_a_repaired_weight_of_another_size_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    strategy = replace(random_strategy(model), repairs=Repairs({(None, HALF): {"0.mlp": torch.ones(3, 64)}}))
    with pytest.raises(ArtifactError, match=r"repaired weight of 0.mlp is \(3, 64\)"):
        ElasticModel(model, strategy)


def test_a_switch_takes_a_pointer(elastic: ElasticModel) -> None:
    linear = elastic.model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(linear, ElasticLinear)
    held = {name: buffer.data_ptr() for name, buffer in linear.named_buffers()}
    for shape in (*elastic.space, *elastic.space):
        elastic.set_shape(shape)
        weight = linear.repaired_weight(lambda: linear.weight) if linear.repaired else linear.weight
        own = shape.width < 1 or shape.depth == 3
        assert (weight.data_ptr() in held.values()) is own, str(shape)
        assert not own or weight.shape[1] == linear.active_in
    assert {name: buffer.data_ptr() for name, buffer in linear.named_buffers()} == held
    assert not [name for name in elastic.model.state_dict() if "repaired" in name]
    elastic.release()
    assert type(linear) is nn.Linear
    assert not list(linear.named_buffers())


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_checkpoint_holds_what_every_shape_needs(model_type: str, stream: bool, tmp_path: Path) -> None:
    model = random_model(CONFIGS[model_type])
    model.save_pretrained(tmp_path / "base")
    elastic = ElasticModel(model, repaired_strategy(model))
    save_elastic(elastic, attach_random_smol(elastic), tmp_path / "elastic", str(tmp_path / "base"))
    loaded, _ = load_elastic(tmp_path / "elastic", stream=stream)
    for shape in elastic.space:
        assert torch.equal(logits_at(loaded, shape), logits_at(elastic, shape)), str(shape)
    assert extract_checkpoint(tmp_path / "elastic", "3x1/2", tmp_path / "out").max_logit_difference <= 1e-4


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_layers_of_different_sizes_are_padded_with_their_repaired_weights(model_type: str) -> None:
    model = random_model(CONFIGS[model_type])
    elastic = ElasticModel(model, repaired_strategy(model, uneven_strategy(model)))
    for shape in ("3x1/2", "2x3/4"):
        expected = logits_at(elastic, shape)
        for portable in (False, True):
            require_close(logits(extract(elastic, shape, portable)), expected, 1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_where_the_model_itself_is_trained_every_shape_trains_the_shared_weights(
    model_type: str, tmp_path: Path
) -> None:
    model = random_model(CONFIGS[model_type])
    model.save_pretrained(tmp_path / "base")
    strategy = repaired_strategy(model)
    elastic = ElasticModel(model, strategy)
    before = {shape: logits_at(elastic, shape) for shape in elastic.space}
    trainer = make_trainer(elastic, tmp_path / "run", max_steps=2, learning_rate=1e-3)
    for shape in elastic.space:
        require_close(logits_at(elastic, shape), before[shape], 1e-4)
    elastic.set_shape("3x1/2")
    elastic.model(torch.arange(10)[None]).logits.sum().backward()
    names = ("mlp.down_proj.weight", "mlp.experts.down_proj")
    (gradient,) = (each.grad for name, each in elastic.layers[2].named_parameters() if name in names)
    assert gradient is not None
    assert bool(gradient[..., 0].any())
    assert not bool(gradient[..., -1].any())
    elastic.model.zero_grad()
    trainer.train()
    save_elastic(elastic, None, tmp_path / "elastic", str(tmp_path / "base"), trained_base=True)
    loaded, _ = load_elastic(tmp_path / "elastic")
    assert not torch.equal(loaded.strategy.repairs.weights[None, HALF]["0.attention"],
                           strategy.repairs.weights[None, HALF]["0.attention"])  # fmt: skip
    for shape in elastic.space:
        assert (logits_at(elastic, shape) - before[shape]).abs().max() > 1e-3, "nothing was trained"
        require_close(logits_at(loaded, shape), logits_at(elastic, shape), 1e-4)


def test_beside_packed_weights_repaired_ones_are_dense() -> None:
    reference, model = unpack(pack(random_model(CONFIGS["qwen2"]))), pack(random_model(CONFIGS["qwen2"]))
    strategy = repaired_strategy(reference)
    dense, packed = ElasticModel(reference, strategy), ElasticModel(model, strategy)
    assert packed.packed
    for shape in packed.space:
        require_close(logits_at(packed, shape), logits_at(dense, shape))
        require_close(logits(extract(packed, shape)), logits_at(dense, shape))


def test_smol_is_not_merged_where_a_repaired_weight_would_lack_it(elastic: ElasticModel) -> None:
    model = attach_smol(elastic, SmolConfig(r=2, num_experts=2, top_k=1, target_modules="all-linear"))
    elastic.set_shape("4x1/2")
    with pytest.raises(AdapterError, match="o_proj' has a repaired weight at this shape"):
        model.merge_adapter()
    elastic.set_shape("4x1")
    model.merge_adapter()


def test_a_merged_lora_is_refused_where_a_repaired_weight_lacks_it(elastic: ElasticModel) -> None:
    model = attach_lora(elastic, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")).eval()
    expected = logits_at(elastic, "4x1")
    narrow = logits_at(elastic, "4x1/2")
    model.merge_adapter()
    require_close(logits_at(elastic, "4x1"), expected, 1e-4)
    with pytest.raises(AdapterError, match="the LoRA is merged into shared weights, and shape 4x1/2 has repaired ones"):
        logits_at(elastic, "4x1/2")
    model.unmerge_adapter()
    require_close(logits_at(elastic, "4x1/2"), narrow, 1e-4)
    require_close(logits(extract(elastic, "4x1/2")), narrow, 1e-4)
