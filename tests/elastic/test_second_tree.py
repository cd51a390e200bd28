"""A second tree of modules on the same weights: each tree against every shape's own checkpoint, in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.second_tree import second_tree
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.testing.random_models import attach_random_smol
from support.architectures import CONFIGS
from support.models import logits, make_tiny_model, random_elastic, require_close
from support.sublayers import TABLE, elastic_of
from support.training import gradients_of

TinyModel = Callable[..., PreTrainedModel]


def adapted(live: ElasticModel, adapter: str) -> ElasticModel:
    if adapter == "smol":
        attach_random_smol(live)
    if adapter == "lora":
        attach_lora(live, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).eval()
    return live


def bytes_of_tensors() -> int:
    """Return the bytes of all storages that are alive in this process."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(
    ("model_type", "adapter"),
    [("llama", "none"), ("llama", "smol"), ("llama", "lora"), ("phi3", "smol"), ("phi3", "lora"), ("mixtral", "smol")],
)
def test_two_trees_give_the_logits_of_their_shapes_alone_in_turns(model_type: str, repaired: bool, adapter: str):
    live = adapted(random_elastic(make_tiny_model(**CONFIGS[model_type]), repaired=repaired), adapter)
    shapes = ["4x1", "3x1/2", "2x3/4", "3x1"]
    with torch.no_grad():
        expected = {shape: logits(extract(live, shape)) for shape in shapes}
    live.set_shape("3x3/4")
    second = second_tree(live)
    assert (str(live.shape), str(second.shape)) == ("3x3/4", "3x3/4")
    for one, other in zip(shapes, shapes[1:] + shapes[:1], strict=True):
        live.set_shape(one)
        second.set_shape(other)
        for tree, shape in ((live, one), (second, other), (live, one)):
            require_close(logits(tree.model), expected[shape], 1e-4)


def test_a_second_tree_of_sublayers_takes_what_is_out_along():
    live = elastic_of(make_tiny_model("llama"))
    with torch.no_grad():
        expected = {shape: logits(extract(live, shape)) for shape in ("2.5x1", "3.5x1/2")}
    live.set_shape("2.5x1")
    second = second_tree(live)
    require_close(logits(second.model), expected["2.5x1"], 1e-4)
    second.set_shape("3.5x1/2")
    require_close(logits(second.model), expected["3.5x1/2"], 1e-4)
    require_close(logits(live.model), expected["2.5x1"], 1e-4)
    assert len(TABLE) > 2


def test_all_tensors_are_the_same_and_nothing_of_size_is_new():
    live = random_elastic(make_tiny_model("llama", hidden_size=256, vocab_size=2000), repaired=True)
    attach_random_smol(live)
    before = bytes_of_tensors()
    second = second_tree(live)
    new = bytes_of_tensors() - before
    of_both = [{**dict(tree.model.named_parameters()), **dict(tree.model.named_buffers())} for tree in (live, second)]
    assert of_both[0].keys() == of_both[1].keys()
    assert all(each.data_ptr() == of_both[1][name].data_ptr() for name, each in of_both[0].items())
    assert not {*live.model.modules()} & {*second.model.modules()}
    assert 0 <= new < 0.001 * before


def test_what_changes_a_weight_is_seen_by_both():
    live = random_elastic(make_tiny_model("llama"))
    second = second_tree(live)
    with torch.no_grad():
        live.model.get_output_embeddings().weight.mul_(2)
    assert torch.equal(logits(second.model), logits(live.model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_second_tree_recomputes_its_layers_at_the_shape_they_were_run_at(reentrant: bool):
    tokens, found = torch.arange(3, 12)[None], []
    for checkpointing in (False, True):
        second = second_tree(random_elastic(make_tiny_model("llama"))) if checkpointing else None
        tree = second or random_elastic(make_tiny_model("llama"))
        tree.model.train()
        if checkpointing:
            tree.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tree.set_shape("2x1/2")
        loss = tree.model(input_ids=tokens, labels=tokens).loss
        tree.set_shape("4x1")
        loss.backward()
        found.append(gradients_of(tree.model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_streamed_weights_cannot_be_shared(tmp_path: Path):
    make_tiny_model("llama").save_pretrained(tmp_path / "base")
    live = random_elastic(make_tiny_model("llama"))
    save_elastic(live, None, tmp_path / "elastic", str(tmp_path / "base"))
    streamed, _ = load_elastic(tmp_path / "elastic", stream=True)
    with pytest.raises(ArchitectureError, match="load it whole"):
        second_tree(streamed)
