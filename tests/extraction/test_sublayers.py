"""Subnets without some attentions and MLPs as checkpoints: a class of their own, or a stock one that ends in zeros."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.audit import require_sizes
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.kept import read_kept
from amoeba_plugin.testing.random_models import random_model
from amoeba_plugin.testing.reload import reload_plainly
from support.models import logits
from support.sublayers import CASES, ENDS, TABLE, elastic_of, tokens_of

SHAPE = "2.5x1/2"  # an attention is gone, and a layer


def reference(elastic: ElasticModel, shape: str, tokens: Tensor) -> Tensor:
    with elastic.active(shape) as model:
        return logits(model, tokens)


@torch.no_grad()
def step_by_step(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    cache, steps = DynamicCache(config=model.config), []
    for position in range(tokens.shape[1]):
        steps.append(model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_elastic_equals_extracted_equals_reloaded(case: str, tmp_path: Path) -> None:
    elastic, tokens = elastic_of(random_model(CASES[case])), tokens_of(CASES[case])
    for shape in (SHAPE, "3x1"):
        expected = reference(elastic, shape, tokens)
        subnet = extract(elastic, shape)
        assert type(subnet).__name__.startswith("PerLayer")
        torch.testing.assert_close(logits(subnet, tokens), expected, atol=1e-4, rtol=0)
        directory = tmp_path / shape.replace("/", "_")
        subnet.save_pretrained(directory)
        reloaded, report = AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=True, output_loading_info=True
        )
        assert not any(report.values()), report
        torch.testing.assert_close(logits(reloaded, tokens), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(step_by_step(reloaded, tokens), expected, atol=1e-4, rtol=0)
        kept, lost = read_kept(TABLE[shape.partition("x")[0]])
        stated = json.loads((directory / "config.json").read_text())
        assert stated["num_hidden_layers"] == len(kept)
        skipped = {int(key): each["skip"] for key, each in stated["per_layer_config"].items() if "skip" in each}
        assert skipped == {kept.index(layer): [part] for layer, part in lost.items()}
        names = [name for name, _ in reloaded.named_parameters()]
        for layer, part in lost.items():
            assert not [
                name for name in names if any(f"layers.{kept.index(layer)}.{end}" in name for end in ENDS[part])
            ]


@pytest.mark.parametrize("case", CASES)
def test_a_portable_subnet_is_a_stock_class(case: str, tmp_path: Path) -> None:
    elastic, tokens = elastic_of(random_model(CASES[case])), tokens_of(CASES[case])
    expected = reference(elastic, SHAPE, tokens)
    before = reference(elastic, "4x1", tokens)
    subnet = extract(elastic, SHAPE, portable=True)
    assert "PerLayer" not in type(subnet).__name__
    subnet.save_pretrained(tmp_path / "portable")
    found = reload_plainly(tmp_path, tokens)
    for logits_found in (logits(subnet, tokens), found["portable"], found["portable.cached"]):
        torch.testing.assert_close(logits_found, expected, atol=1e-4, rtol=0)
    assert torch.equal(reference(elastic, "4x1", tokens), before)
    assert torch.equal(reference(elastic, SHAPE, tokens), expected)


@pytest.mark.parametrize("shape", ["3.5x1", "2x1"])
@pytest.mark.parametrize("case", ["llama", "gpt_neox", "opt", "gemma2"])
def test_without_its_own_class_such_a_checkpoint_does_not_load(case: str, shape: str, tmp_path: Path) -> None:
    extract(elastic_of(random_model(CASES[case])), shape).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="MISMATCH|size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


def test_attentions_alone_are_no_checkpoint_of_their_own() -> None:
    elastic = elastic_of(random_model(CASES["llama"]), {"1": ["1.attention", "3.attention"]})
    with pytest.raises(ArchitectureError, match="no layer of this shape keeps its MLP.*--portable"):
        extract(elastic, "1x1")
    tokens = tokens_of(CASES["llama"])
    torch.testing.assert_close(
        logits(extract(elastic, "1x1", portable=True), tokens), reference(elastic, "1x1", tokens), atol=1e-4, rtol=0
    )


def test_a_sublayer_that_is_still_there_is_named() -> None:
    elastic = elastic_of(random_model(CASES["llama"]))
    subnet = extract(elastic, "3x1")
    sizes = elastic.plan.sizes(elastic.space.require("3x1"))
    assert sizes.lost == {1: "mlp", 2: "attention"}
    require_sizes(subnet.model.layers, elastic.adapter, elastic.config, sizes)
    with pytest.raises(ArchitectureError, match="layer 3, mlp: 0 parameters asked for, 18656 there"):
        require_sizes(
            subnet.model.layers, elastic.adapter, elastic.config, replace(sizes, lost={**sizes.lost, 3: "mlp"})
        )
