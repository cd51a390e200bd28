"""Attention and MLP as units of depth, against models in which the projections that end them are zero."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.kept import read_kept
from amoeba_plugin.testing.random_models import random_model
from support.models import logits
from support.sublayers import CASES, ENDS, POSITIONS, TABLE, elastic_of, tokens_of, zeroed


@pytest.mark.parametrize("case", CASES)
def test_a_shape_without_sublayers_is_the_model_with_zeros_where_they_end(case: str) -> None:
    model, tokens = random_model(CASES[case]), tokens_of(CASES[case])
    expected = {depth: logits(zeroed(model, kept), tokens) for depth, kept in TABLE.items()}
    before, config = logits(model, tokens), model.config.to_dict()
    elastic = elastic_of(model)
    for depth, reference in expected.items():
        with elastic.active(f"{depth}x1"):
            assert not torch.allclose(reference, before, atol=1e-2)
            torch.testing.assert_close(logits(model, tokens), reference, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model, tokens), before, atol=1e-4, rtol=0)
    assert model.config.to_dict() == config
    with elastic.active("2.5x1/2"):
        narrow = logits(model, tokens)
    torch.testing.assert_close(narrow, logits(zeroed(narrowed(case), TABLE["2.5"]), tokens), atol=1e-4, rtol=0)


def narrowed(case: str) -> PreTrainedModel:
    """Return the whole model at half its width, with ordinary modules of its own."""
    elastic = elastic_of(random_model(CASES[case]))
    elastic.set_shape("4x1/2")
    return elastic.model


@pytest.mark.parametrize("case", CASES)
def test_decoding_with_a_cache_agrees_step_by_step(case: str) -> None:
    elastic, tokens = elastic_of(random_model(CASES[case])), tokens_of(CASES[case])
    for shape in ("3.5x3/4", "3x1", "2x1", "1x1/2"):
        with elastic.active(shape) as model, torch.no_grad():
            expected, cache = logits(model, tokens), DynamicCache(config=model.config)
            for position in range(POSITIONS):
                step = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True).logits[:, 0]
                torch.testing.assert_close(step, expected[:, position], atol=1e-4, rtol=0, msg=f"{shape}, {position}")
            assert cache.get_seq_length() == POSITIONS


def test_a_cache_of_fixed_size_serves_a_model_without_its_first_attention() -> None:
    elastic, tokens = elastic_of(random_model(CASES["llama"])), tokens_of(CASES["llama"])
    with elastic.active("3.5x1") as model, torch.no_grad():
        expected, cache = logits(model, tokens), StaticCache(config=model.config, max_cache_len=POSITIONS)
        for first, last in ((0, 4), (4, 5), (5, POSITIONS)):
            positions = torch.arange(first, last)
            step = model(
                tokens[:, first:last], past_key_values=cache, use_cache=True, position_ids=positions[None],
            ).logits  # fmt: skip
            torch.testing.assert_close(step, expected[:, first:last], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_is_gone_computes_nothing_and_comes_back(case: str) -> None:
    model, tokens = random_model(CASES[case]), tokens_of(CASES[case])
    elastic = elastic_of(model)
    memory = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before = logits(model, tokens)
    sublayers = elastic.adapter.sublayers(model.config)
    gone = {
        elastic.layers[index].get_submodule(path)
        for index, part in read_kept(TABLE["3"])[1].items()
        for path in sublayers[part].stand_ins
    }
    called: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: called.append(module))
    with elastic.active("3x1"):
        called.clear()
        logits(model, tokens)
        present = {name for name, _ in model.named_parameters()}
        for position, (index, part) in ((1, (1, "mlp")), (2, (2, "attention"))):
            assert read_kept(TABLE["3"])[1][index] == part
            assert not any(f"layers.{position}.{end}" in name for name in present for end in ENDS[part])
        assert gone
        assert not gone & set(called)
    assert torch.equal(logits(model, tokens), before)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == memory
    with pytest.raises(RuntimeError, match="stop"), elastic.active("2x1"):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, tokens), before)


def test_gradients_reach_what_is_there_and_modes_reach_what_was_away() -> None:
    elastic, tokens = elastic_of(random_model(CASES["gemma2"])), tokens_of(CASES["gemma2"])
    with elastic.active("3x1") as model:
        model.train()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        present = dict(model.named_parameters())
        assert all(parameter.grad is not None for parameter in present.values())
    assert all(module.training for module in elastic.model.modules())
    missing = {name for name, parameter in elastic.model.named_parameters() if parameter.grad is None}
    assert any("1.mlp" in name for name in missing)
    assert any("2.self_attn" in name for name in missing)
    assert not any("3." in name for name in missing)


def test_an_adapter_that_names_no_sublayers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_plugin.models.adapter import ArchitectureAdapter
    from amoeba_plugin.models.architectures.gated import GatedDecoder

    monkeypatch.setattr(GatedDecoder, "sublayers", ArchitectureAdapter.sublayers)
    with pytest.raises(ArchitectureError, match="set granularity: layer"):
        elastic_of(random_model(CASES["llama"]))


def test_depths_in_one_space_count_half_layers() -> None:
    elastic = elastic_of(random_model(CASES["llama"]))
    assert str(elastic.space) == "depths {4, 3.5, 3, 2.5, 2, 1} x widths {1, 3/4, 1/2}"
    assert elastic.kept_layers(elastic.space.require("2.5")) == (0, 2, 3)
    assert elastic.listed(elastic.space.require("2.5x1/2")) == ["0.mlp", 2, 3]
    assert elastic.space.smallest.width == Fraction(1, 2)
