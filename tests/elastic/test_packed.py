"""Elastic models whose linears are packed compute, learn and are cut as those of the unpacked weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError, ArtifactError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.registry import importance_named, objective_named
from amoeba_plugin.selection.width.ranking import coupled_parameters, rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.testing.random_models import WIDTHS, random_model
from support.architectures import CONFIGS
from support.depth_search import searched
from support.models import logits, require_close
from support.packed_linears import IntegerLinear, PackedLinear, pack, unpack
from support.strategies import random_strategy
from support.sublayers import elastic_of
from support.training import attach_adapter, require_equal_training, train_by_large_steps

TinyModel = Callable[..., PreTrainedModel]
COMPENSATED = {"gpt_neox", "granite", "llama", "opt", "smollm3", "phi3"}  # at least elastically


@pytest.mark.parametrize("cls", [PackedLinear, IntegerLinear])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_shape_of_every_architecture(model_type: str, cls: Any) -> None:
    config = CONFIGS[model_type]
    reference = unpack(pack(random_model(config), cls))
    strategy = random_strategy(reference, bias_compensation=model_type in COMPENSATED)
    model = pack(random_model(config), cls)
    before, classes = logits(model), [type(module) for module in model.modules()]
    dense, packed = ElasticModel(reference, strategy), ElasticModel(model, strategy)
    assert packed.packed
    assert not dense.packed
    for shape in packed.space:
        with packed.active(shape) as one, dense.active(shape) as other:
            require_close(logits(one), logits(other))
    require_close(logits(model), before)
    packed.release()
    assert [type(module) for module in model.modules()] == classes
    require_close(logits(model), before)


@pytest.mark.parametrize("model_type", ["phi3", "qwen3"])
def test_shapes_without_some_attentions_and_mlps(model_type: str) -> None:
    reference = unpack(pack(random_model(CONFIGS[model_type])))
    dense, packed = elastic_of(reference), elastic_of(pack(random_model(CONFIGS[model_type])))
    for shape in ("3.5x1", "2.5x3/4", "1x1/2"):
        with packed.active(shape) as one, dense.active(shape) as other:
            served = logits(one)
            require_close(served, logits(other))
        require_close(logits(extract(packed, shape)), served)


@pytest.mark.filterwarnings("ignore")  # what the library says of itself when it is imported
def test_weights_of_torchao(tmp_path: Path) -> None:
    """Its linears are of torch's own class, and their weights are not."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    full = random_model(CONFIGS["llama"])
    full.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    reference = random_model(CONFIGS["llama"])
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            reference.model.layers.get_submodule(name).weight.data.copy_(module.weight.dequantize())
    dense, packed = ElasticModel(reference, random_strategy(reference)), ElasticModel(model, random_strategy(full))
    assert packed.packed
    for shape in packed.space:
        with packed.active(shape) as one, dense.active(shape) as other:
            require_close(logits(one), logits(other), 1e-4)
    with packed.active("2x1/2") as one:
        require_close(logits(extract(packed, "2x1/2")), logits(one), 1e-4)


def test_a_group_of_which_some_linears_are_packed_and_some_are_not() -> None:
    """Norms over the channels of packed linears are dense as well: what was permuted in place goes back."""
    config = CONFIGS["olmo2"]
    reference, model = (pack(random_model(config), skip="up_proj") for _ in range(2))
    reference = unpack(reference)
    before, names = logits(model), {name: each.clone() for name, each in model.named_parameters()}
    strategy = random_strategy(reference)
    dense, packed = ElasticModel(reference, strategy), ElasticModel(model, strategy)
    for shape in packed.space:
        with packed.active(shape) as one, dense.active(shape) as other:
            require_close(logits(one), logits(other))
    assert not torch.equal(
        model.model.layers[0].self_attn.q_norm.weight, names["model.layers.0.self_attn.q_norm.weight"]
    )
    packed.release()
    assert torch.equal(logits(model), before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, names[name]), name


@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
@pytest.mark.parametrize("kind", ["smol", "lora"])
def test_an_adapter_learns_and_is_cut_as_on_the_unpacked_weights(model_type: str, kind: str, tmp_path: Path) -> None:
    config = CONFIGS[model_type]
    reference = unpack(pack(random_model(config)))
    strategy = random_strategy(reference)
    dense, packed = ElasticModel(reference, strategy), ElasticModel(pack(random_model(config)), strategy)
    expected, found = attach_adapter(dense, kind), attach_adapter(packed, kind)
    for elastic, model in ((dense, expected), (packed, found)):
        train_by_large_steps(elastic, model, tmp_path)
        model.eval()
    require_equal_training(found, expected, 1e-5)
    for shape in ("4x1", "3x3/4", "2x1/2"):
        with packed.active(shape) as one:
            served = logits(one)
        subnet = extract(packed, shape)
        assert not hasattr(subnet.config, "quantization_config")
        require_close(logits(subnet), served)


def test_an_unused_base_linear_is_unpacked_too(tmp_path: Path) -> None:
    """GPT-NeoX keeps its heads: no group has its attention's linears, and a subnet holds them dense."""
    elastic = ElasticModel(model := pack(random_model(CONFIGS["gpt_neox"])), random_strategy(model))
    attention = elastic.layers[0].attention.query_key_value
    assert type(attention) is PackedLinear
    with elastic.active("2x1/2") as active:
        served = logits(active)
    extract(elastic, "2x1/2").save_pretrained(tmp_path)
    require_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), served)


def test_selection_sees_the_unpacked_weights(random_batches: Callable[..., Any]) -> None:
    config = CONFIGS["llama"]
    found = []
    for model in (pack(random_model(config)), unpack(pack(random_model(config)))):
        adapter, batches = architecture_for("llama"), materialise(random_batches())
        depth = searched(model, adapter, objective_named("loss"), batches, min_depth=2)
        stats = collect_statistics(model, adapter, batches, progress=False)
        widths = [
            rank_widths(WidthTask(model, adapter, importance_named(name), WIDTHS, stats))
            for name in ("flap", "wanda", "magnitude", "group_magnitude")
        ]
        found.append((depth.kept, [{key: order.tolist() for key, order in each.order.items()} for each in widths]))
    assert found[0] == found[1]


def test_gradients_of_packed_weights_are_refused() -> None:
    model = pack(random_model(CONFIGS["llama"]))
    with pytest.raises(ArchitectureError, match="q_proj is quantized, and packed weights have no gradients; take"):
        coupled_parameters(model, architecture_for("llama"))


def test_a_strategy_fits_the_model_and_its_quantized_copy_but_no_other() -> None:
    config = CONFIGS["qwen2"]
    full, packed = random_strategy(random_model(config)), random_strategy(pack(random_model(config)))
    ElasticModel(pack(random_model(config)), full)
    ElasticModel(random_model(config), packed)
    for strategy, other in ((full, pack(random_model(config, 1))), (packed, random_model(config, 1))):
        with pytest.raises(ArtifactError, match="belongs to a model with fingerprint"):
            ElasticModel(other, strategy)
    with pytest.raises(ArtifactError, match="belongs to a model with fingerprint"):
        ElasticModel(unpack(pack(random_model(config))), full)  # rounded weights are others


def test_packed_weights_themselves_are_not_trained() -> None:
    elastic = ElasticModel(model := pack(random_model(CONFIGS["llama"])), random_strategy(model))
    with pytest.raises(ArchitectureError, match="are quantized and cannot be trained; put an adapter on it"):
        elastic.reordered_strategy()


def test_made_elastic_twice_or_with_an_adapter_is_refused() -> None:
    model = pack(random_model(CONFIGS["llama"]))
    strategy = random_strategy(model)
    ElasticModel(model, strategy)
    with pytest.raises(ArchitectureError, match="already elastic"):
        ElasticModel(model, strategy)


@pytest.mark.parametrize("packed", [False, True])
def test_hooks_of_accelerate_run_in_front_of_elastic_linears(packed: bool) -> None:
    """A hook keeps the forward of the class that a module had: it would compute with the whole weight."""
    prepare: Any = pack if packed else (lambda model: model)
    strategy = random_strategy(prepare(random_model(CONFIGS["llama"])))
    plain = ElasticModel(prepare(random_model(CONFIGS["llama"])), strategy)
    hooked = dispatch_model(prepare(random_model(CONFIGS["llama"])), {"": "cpu"}, force_hooks=True)
    before = logits(hooked)
    elastic = ElasticModel(hooked, strategy)
    for shape in plain.space:
        with plain.active(shape) as one, elastic.active(shape) as other:
            assert torch.equal(logits(one), logits(other))
    elastic.release()
    require_close(logits(hooked), before)
