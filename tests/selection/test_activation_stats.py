"""Statistics of activations, exact for any cut into batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.errors import DataError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection import activation_stats
from amoeba_plugin.selection.activation_stats import ActivationStats, collect_statistics

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]
FAMILY = ["llama", "mistral", "qwen2", "qwen3"]


def looped(values: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    """Return mean, variance and second moment of each channel; the definition, in Python's floats."""
    means, variances, moments = [], [], []
    for channel in zip(*values, strict=True):
        mean = sum(channel) / len(channel)
        means.append(mean)
        variances.append(sum((x - mean) ** 2 for x in channel) / len(channel))
        moments.append(sum(x**2 for x in channel) / len(channel))
    return means, variances, moments


@given(st.integers(1, 40), st.data(), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_merging_any_cut_gives_the_single_pass(tokens: int, data: st.DataObject, offset: float, spread: float) -> None:
    inputs = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(tokens)) * spread + offset
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=6)))
    bounds = [0, *cuts, tokens]
    merged = ActivationStats.empty(3)
    for start, stop in pairwise(bounds):  # empty parts too
        merged = merged.merge(ActivationStats.of(inputs[start:stop]))
    mean, variance, moment = (torch.tensor(each, dtype=torch.float64) for each in looped(inputs.double().tolist()))
    assert merged.tokens == tokens
    scale = float(inputs.abs().max()) ** 2
    torch.testing.assert_close(merged.mean, mean, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(merged.variance, variance, rtol=1e-7, atol=1e-12 * scale)
    torch.testing.assert_close(merged.second_moment, moment, rtol=1e-9, atol=1e-12 * scale)


def test_no_tokens_have_no_spread() -> None:
    nothing = ActivationStats.empty(2).merge(ActivationStats.empty(2))
    assert (nothing.tokens, nothing.variance.tolist()) == (0, [0.0, 0.0])


def test_many_tokens_are_taken_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 100
    whole = ActivationStats.of(inputs)
    monkeypatch.setattr(activation_stats, "VALUES_AT_ONCE", 30)  # 7 tokens
    parts = ActivationStats.of(inputs)
    assert parts.tokens == whole.tokens == 50
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.variance, whole.variance, rtol=1e-9, atol=0)


@pytest.mark.parametrize("model_type", FAMILY)
def test_statistics_are_those_of_every_real_token_run_alone(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str
) -> None:
    model = tiny_model(model_type)
    batches = random_batches(2, 3, 10, lengths=(10, 4, 7))
    inputs: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for name, linear in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            linear.register_forward_hook(
                lambda module, args, output, key=f"{index}.{name}": inputs.setdefault(key, []).append(args[0][0])
            )
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(ids[None, : int(mask.sum())], use_cache=False)  # unpadded, one row at a time
    wanted = {key: torch.cat(parts).double() for key, parts in inputs.items()}
    found = collect_statistics(tiny_model(model_type), architecture_for(model_type), batches, progress=False)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].tokens == len(values) == 42
        torch.testing.assert_close(found[key].mean, values.mean(dim=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[key].variance, values.var(dim=0, correction=0), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found[key].second_moment, values.square().mean(dim=0), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_statistics_do_not_depend_on_the_batch_size(
    tiny_model: TinyModel, random_batches: RandomBatches, rows: int
) -> None:
    model, adapter = tiny_model("llama"), architecture_for("llama")
    (whole,) = random_batches(1, 6, 10, lengths=(10, 3, 10, 8, 1, 5))
    parts = [{name: value[start : start + rows] for name, value in whole.items()} for start in range(0, 6, rows)]
    wanted = collect_statistics(model, adapter, [whole], progress=False)
    for key, stats in collect_statistics(model, adapter, parts, progress=False).items():
        torch.testing.assert_close(stats.variance, wanted[key].variance, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(stats.mean, wanted[key].mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_layer_and_batch_and_leave_no_hook(
    tiny_model: TinyModel, random_batches: RandomBatches, value: float
) -> None:
    model, batches = tiny_model("llama").train(), random_batches(3)
    batches[1]["input_ids"][0, 0] = 2
    batches[0]["input_ids"].clamp_(min=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = value
    with pytest.raises(DataError, match=r"activations of 0\.attention are NaN or infinite on calibration batch 1"):
        collect_statistics(model, architecture_for("llama"), batches, progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_statistics_need_tokens(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    for batches in ([], random_batches(1, lengths=(0, 0))):
        with pytest.raises(DataError, match="no token to collect statistics from"):
            collect_statistics(tiny_model("llama"), architecture_for("llama"), batches)
