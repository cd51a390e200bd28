"""A subnet is an ordinary checkpoint: elastic logits == extracted == reloaded where this package cannot be imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError, ShapeError
from amoeba_plugin.extraction.cut import become, extract
from amoeba_plugin.testing.architectures import require_stated_sizes
from amoeba_plugin.testing.random_models import attach_random_smol
from amoeba_plugin.testing.reload import reload_plainly
from support.models import logits, random_elastic, random_tokens

TinyModel = Callable[..., PreTrainedModel]
FAMILY = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def tokens() -> Tensor:
    return random_tokens(positions=10)


def adapted(model: PreTrainedModel, bias_compensation: bool) -> ElasticModel:
    """Elastic, with a SMOL adapter whose every parameter is random, and random compensation."""
    elastic = random_elastic(model, bias_compensation=bias_compensation)
    attach_random_smol(elastic)
    return elastic


@pytest.mark.parametrize(
    ("model_type", "bias_compensation"),
    [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", False)],
)
def test_an_adapted_and_compensated_model_equals_extracted_equals_reloaded_at_every_shape(
    tiny_model: TinyModel, tokens: Tensor, tmp_path: Path, model_type: str, bias_compensation: bool
) -> None:
    # The class that can hold the biases has no sliding window.
    model = tiny_model(
        model_type, **({"sliding_window": None} if bias_compensation and model_type == "mistral" else {})
    )
    elastic = adapted(model, bias_compensation)
    expected, groups = {}, elastic.adapter.channel_groups(elastic.config)
    for shape in elastic.space:
        name = str(shape).replace("/", "_")
        with elastic.active(shape):
            expected[name] = logits(elastic.model, tokens)
        subnet = extract(elastic, shape)
        torch.testing.assert_close(logits(subnet, tokens), expected[name], atol=1e-4, rtol=0)
        units = {group.name: int(group.units * elastic.space.require(shape).width) for group in groups}
        require_stated_sizes(subnet, elastic.adapter, len(elastic.kept_layers(shape)), units)
        subnet.save_pretrained(tmp_path / name)
    found = reload_plainly(tmp_path, tokens)
    assert len(found) == 2 * len(elastic.space)
    for name, reference in expected.items():
        torch.testing.assert_close(found[name], reference, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[f"{name}.cached"], reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "shape", "compensated", "class_name"),
    [
        ("llama", "3x1", False, "LlamaForCausalLM"),
        ("llama", "3x1/2", False, "LlamaForCausalLM"),
        ("llama", "3x3/4", False, "MistralForCausalLM"),  # 6 heads do not divide hidden 64
        ("llama", "3x3/4", True, "SeedOssForCausalLM"),
        ("mistral", "3x3/4", False, "MistralForCausalLM"),
        ("qwen2", "3x1/2", True, "SeedOssForCausalLM"),
        ("qwen3", "3x3/4", False, "Qwen3ForCausalLM"),
    ],
)
def test_the_class_is_the_models_own_or_an_identical_one_that_holds_the_sizes(
    tiny_model: TinyModel, model_type: str, shape: str, compensated: bool, class_name: str
) -> None:
    assert (
        type(extract(random_elastic(tiny_model(model_type), bias_compensation=compensated), shape)).__name__
        == class_name
    )


def test_the_elastic_model_is_left_as_it_was_and_shares_no_memory(tiny_model: TinyModel, tokens: Tensor) -> None:
    elastic = adapted(tiny_model("llama"), False)
    before = logits(elastic.model, tokens)
    subnet = extract(elastic, "4x1")
    with torch.no_grad():
        for parameter in subnet.parameters():
            parameter.zero_()
    assert torch.equal(logits(elastic.model, tokens), before)
    assert elastic.shape == elastic.space.largest


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tiny_model: TinyModel, tied: bool) -> None:
    subnet = extract(random_elastic(tiny_model("llama", tie_word_embeddings=tied)), "2x1/2")
    assert (subnet.lm_head.weight is subnet.model.embed_tokens.weight) == tied


def test_become_turns_a_held_object_into_the_subnet(tiny_model: TinyModel, tokens: Tensor) -> None:
    model = tiny_model("llama")
    elastic = random_elastic(model)
    subnet = extract(elastic, "2x3/4")
    expected = logits(subnet, tokens)
    become(model, subnet)
    assert type(model).__name__ == "MistralForCausalLM"
    assert torch.equal(logits(model, tokens), expected)


def test_qwen3_cannot_store_compensation_and_says_so(tiny_model: TinyModel) -> None:
    with pytest.raises(ArchitectureError, match="set bias_compensation: false"):
        extract(random_elastic(tiny_model("qwen3"), bias_compensation=True), "4x1/2")


def test_a_sliding_window_and_compensation_have_no_class_and_say_so(tiny_model: TinyModel) -> None:
    elastic = random_elastic(tiny_model("mistral", sliding_window=8), bias_compensation=True)
    with pytest.raises(ArchitectureError, match="has no window"):
        extract(elastic, "4x1/2")


def test_a_shape_outside_the_space_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(ShapeError, match="outside the space"):
        extract(random_elastic(tiny_model("llama")), "1x1/2")
