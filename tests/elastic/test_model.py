"""ElasticModel: every shape is a prefix of the same memory; beside what the suite of ``testing`` asks of all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.linear import ElasticLinear
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import ArchitectureError, ShapeError
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.testing.random_models import attach_random_smol
from support.models import logits, random_elastic, random_tokens
from support.strategies import KEPT, random_strategy

TinyModel = Callable[..., PreTrainedModel]
FAMILY = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def tokens() -> Tensor:
    return random_tokens()


@pytest.mark.parametrize("model_type", FAMILY)
def test_with_elastic_depth_alone_the_largest_shape_is_bit_equal(
    tiny_model: TinyModel, tokens: Tensor, model_type: str
) -> None:
    model = tiny_model(model_type)
    before = logits(model, tokens)
    fingerprint = model_fingerprint(model, architecture_for(model_type))
    elastic = ElasticModel(model, SubnetStrategy(DepthStrategy(KEPT), WidthStrategy.whole(), fingerprint))
    with elastic.active("2x1"):
        assert not torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), before)


def test_leaving_a_shape_restores_the_one_before_after_an_exception_too(tiny_model: TinyModel, tokens: Tensor) -> None:
    model = tiny_model("qwen2")
    elastic = random_elastic(model)
    before, config = logits(model, tokens), model.config.to_dict()
    with pytest.raises(KeyError), elastic.active("2x1/2"):
        assert str(elastic.shape) == "2x1/2"
        raise KeyError
    assert elastic.shape == elastic.space.largest
    assert torch.equal(logits(model, tokens), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("model_type", FAMILY)
def test_a_shape_computes_what_masks_compute(tiny_model: TinyModel, tokens: Tensor, model_type: str) -> None:
    """Independent reading: zero the consumer's columns of the units that a width drops, in the original order."""
    strategy = random_strategy(tiny_model(model_type))
    masked, width = tiny_model(model_type), strategy.space.widths[1]
    adapter = architecture_for(model_type)
    with torch.no_grad():
        for index, layer in enumerate(masked.model.layers):
            for group in adapter.channel_groups(masked.config):
                order = strategy.width.order[f"{index}.{group.name}"]
                for unit in order[strategy.width.units[width][f"{index}.{group.name}"] :].tolist():
                    size = group.consumer.channels_per_unit
                    layer.get_submodule(group.consumer.path).weight[:, unit * size : (unit + 1) * size] = 0
    masked.model.layers = nn.ModuleList([masked.model.layers[index] for index in KEPT[3]])
    masked.config.num_hidden_layers = 3
    elastic = ElasticModel(tiny_model(model_type), strategy)
    with elastic.active(f"3x{width}") as model:
        torch.testing.assert_close(logits(model, tokens), logits(masked, tokens), atol=1e-5, rtol=1e-5)


def test_compensation_adds_the_mean_contribution_of_missing_channels(tiny_model: TinyModel) -> None:
    strategy = random_strategy(tiny_model("llama"), bias_compensation=True)
    whole = tiny_model("llama").model.layers[2].mlp.down_proj.weight.detach()
    elastic = ElasticModel(tiny_model("llama"), strategy)
    width = strategy.space.widths[2]
    kept = strategy.width.order["2.mlp"][: strategy.width.units[width]["2.mlp"]]
    missing = torch.ones(whole.shape[1], dtype=torch.bool)
    missing[kept] = False
    expected = whole[:, missing] @ strategy.width.mean_input["2.mlp"][missing]
    with elastic.active(f"4x{width}"):
        consumer = elastic.layers[2].get_submodule("mlp.down_proj")
        found = consumer(torch.zeros(1, consumer.active_in))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_listeners_hear_the_active_shape_at_once_and_at_every_change(tiny_model: TinyModel) -> None:
    elastic, heard = random_elastic(tiny_model("llama")), []
    elastic.on_shape_change(lambda shape: heard.append(str(shape)))
    with elastic.active("2x3/4"):
        pass
    assert heard == ["4x1", "2x3/4", "4x1"]


def test_a_shape_outside_leaves_the_active_one(tiny_model: TinyModel) -> None:
    elastic = random_elastic(tiny_model("llama"))
    with pytest.raises(ShapeError, match="outside the space"):
        elastic.set_shape("1x1")
    assert elastic.shape == elastic.space.largest


def test_release_gives_ordinary_linears_back(tiny_model: TinyModel, tokens: Tensor) -> None:
    model = tiny_model("qwen3")
    keys = set(model.state_dict())
    elastic = random_elastic(model, bias_compensation=False)
    expected = logits(model, tokens)
    elastic.release()
    assert not [module for module in model.modules() if isinstance(module, ElasticLinear)]
    assert set(model.state_dict()) == keys
    assert torch.equal(logits(model, tokens), expected)


def test_a_model_made_elastic_twice_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    fingerprint = model_fingerprint(model, architecture_for("llama"))
    strategy = SubnetStrategy(DepthStrategy(KEPT), WidthStrategy.whole(), fingerprint)
    ElasticModel(model, strategy)
    with pytest.raises(ArchitectureError, match="already elastic"):
        ElasticModel(model, strategy)


def test_a_space_without_the_whole_model_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    fingerprint = model_fingerprint(model, architecture_for("llama"))
    with pytest.raises(ArchitectureError, match="is not the whole model"):
        ElasticModel(model, SubnetStrategy(DepthStrategy({3: (0, 1, 2)}), WidthStrategy.whole(), fingerprint))


def test_an_unsupported_architecture_names_the_supported_ones(tiny_model: TinyModel) -> None:
    with pytest.raises(ArchitectureError, match="'gpt2' is not supported; supported are gemma2, .*llama, .*qwen2, "):
        architecture_for("gpt2")


def test_a_quantized_model_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    strategy = random_strategy(model)
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ArchitectureError, match="already quantized"):
        ElasticModel(model, strategy)


def test_where_an_adapter_refuses_the_shape_stays(tiny_model: TinyModel, tokens: Tensor) -> None:
    """Layers at one shape and an adapter at another would compute neither."""
    elastic = random_elastic(tiny_model("llama"))
    peft_model = attach_random_smol(elastic)
    config = SmolConfig(r=2, num_experts=2, top_k=1, depths=[4], widths=["1"], num_layers=4, target_modules=["q_proj"])
    peft_model.add_adapter("whole", config)
    elastic.set_shape("3x3/4")
    expected = logits(peft_model, tokens)
    peft_model.set_adapter("whole")
    with pytest.raises(ShapeError, match="2x1/2 is outside"):
        elastic.set_shape("2x1/2")
    assert str(elastic.shape) == "3x3/4"
    assert len(elastic.model.model.layers) == 3
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model, tokens), expected)
