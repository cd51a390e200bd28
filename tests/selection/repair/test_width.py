"""Repaired widths of a live model, against regressions on inputs that hooks of our own collect."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import Repairs
from amoeba_plugin.errors import ArchitectureError, DataError
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import repair_named
from amoeba_plugin.selection.repair.collect import collect_moments
from amoeba_plugin.selection.repair.moments import ChannelMoments, held_out_rows
from amoeba_plugin.selection.repair.width import DEFAULT_RIDGE, repair_shapes
from amoeba_plugin.testing.random_models import random_model, random_strategy
from support.architectures import CONFIGS
from support.models import logits_at, make_tiny_model, require_close
from support.packed_linears import pack, unpack

TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[dict[str, Tensor]]]
WIDTHS = (Fraction(3, 4), Fraction(1, 2))
METHODS = ("least_squares", "local_least_squares")


def repaired(model: PreTrainedModel, batches: list[dict[str, Tensor]], method: str = METHODS[0]) -> Repairs:
    runs = LayerRuns.of(model, architecture_for(model.config.model_type), batches)
    return repair_shapes(runs, random_strategy(model).width, repair_named(method), progress=False)


def inputs_of(model: PreTrainedModel, linear: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return what flows into a linear, (tokens, channels) fp64, padding left out."""
    return passing(model, linear.register_forward_pre_hook, lambda args: args[1][0], batches)


def states_behind(model: PreTrainedModel, layer: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the states behind a layer, (tokens, hidden) fp64, padding left out."""
    return passing(model, layer.register_forward_hook, lambda args: args[2], batches)


def passing(
    model: PreTrainedModel, register: Callable[..., Any], of: Callable[[Any], Any], batches: list[dict[str, Tensor]]
) -> Tensor:
    seen: list[Any] = []
    handle = register(lambda *args: seen.append(of(args)))
    rows = []
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            found = seen.pop()
            rows.append((found[0] if isinstance(found, tuple) else found)[batch["attention_mask"].bool()])
    handle.remove()
    return torch.cat(rows).double()


def regression(inputs: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Return A of ``|wanted - inputs A^T|^2 + scale^2 |A|^2``, by rows."""
    extended = torch.cat([inputs, scale * torch.eye(inputs.shape[1]).double()])
    return torch.linalg.lstsq(
        extended, torch.cat([wanted, wanted.new_zeros(inputs.shape[1], wanted.shape[1])])
    ).solution.T


@pytest.mark.parametrize("method", METHODS)
def test_a_width_has_the_regression_on_what_narrow_layers_before_make_of_the_data(
    method: str, tiny_model: TinyModel, random_batches: RandomBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer in the host's own model: inputs by a hook, a regression on rows, columns left out zeroed."""
    batches = random_batches(1, rows=30, lengths=(12, 7) * 15)
    monkeypatch.setattr("amoeba_plugin.selection.repair.width.RIDGES", (DEFAULT_RIDGE,))
    width, dense = random_strategy(tiny_model("llama")).width, tiny_model("llama")
    found = repaired(tiny_model("llama"), batches, method)
    assert found.method == method
    assert list(found.weights) == [(None, share) for share in WIDTHS]
    groups = architecture_for("llama").channel_groups(dense.config)
    for share in WIDTHS:
        model = tiny_model("llama")
        for index, layer in enumerate(model.model.layers):
            for group in groups:  # attention first: the MLP sees what is left of it
                inputs = inputs_of(model, layer.get_submodule(group.consumer.path), batches)
                lost = states_behind(dense, dense.model.layers[index], batches) - states_behind(model, layer, batches)
                assert bool(lost.abs().max() > 1e-3) == (index > 0 or group.name == "mlp")
                key, weight = group_key(index, group), group.consumer.weight(layer).detach()
                order = group.consumer.channels(width.order[key])
                kept = width.units[share][key] * group.consumer.channels_per_unit
                inside, outside = order[:kept], order[kept:]
                missing = inputs[:, outside] @ weight[:, outside].double().T
                change = regression(inputs[:, inside], missing, (DEFAULT_RIDGE * inputs.square().sum(0).mean()).sqrt())
                if method == "least_squares" and group.name == "mlp":  # makes up for half of what was lost so far
                    scale = (1e-2 * inputs[:, inside].square().sum(0).mean()).sqrt()
                    change = change + 0.5 * regression(inputs[:, inside], lost, scale)
                weight[:, inside] = (weight[:, inside] + change).float()
                weight[:, outside] = 0
                require_close(found.weights[None, share][key], weight[:, inside], 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_architecture_comes_nearer_to_the_whole_model(
    model_type: str, method: str, random_batches: RandomBatches
) -> None:
    model, batches = random_model(CONFIGS[model_type]), random_batches(3, rows=4, positions=32)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    repairs = repaired(model, batches, method)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not any(module._forward_pre_hooks or list(module.buffers(recurse=False)) for module in linears(model))
    tokens, strategy = batches[0]["input_ids"], random_strategy(model)
    cut, elastic = (
        ElasticModel(copy.deepcopy(model), replace(strategy, repairs=each)) for each in (Repairs(), repairs)
    )
    whole = logits_at(elastic, "4x1", tokens)
    assert torch.equal(whole, logits_at(cut, "4x1", tokens))
    for share in WIDTHS:
        shape = f"4x{share}"
        assert (logits_at(elastic, shape, tokens) - whole).norm() < 0.9 * (logits_at(cut, shape, tokens) - whole).norm()


def test_packed_weights_are_repaired_as_what_they_unpack_to(random_batches: RandomBatches) -> None:
    reference, model = unpack(pack(random_model(CONFIGS["llama"]))), pack(random_model(CONFIGS["llama"]))
    batches = random_batches(2)
    dense, packed = repaired(reference, batches), repaired(model, batches)
    for place, held in dense.weights.items():
        for key, each in held.items():
            require_close(packed.weights[place][key], each, 1e-4)


def test_a_decoder_whose_layers_cannot_run_alone_is_refused(random_batches: RandomBatches) -> None:
    model = make_tiny_model("llama")
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ArchitectureError, match="layers of a LlamaForCausalLM cannot be run one at a time: the model has"
    ):
        LayerRuns.of(model, architecture_for("llama"), random_batches(1))


def test_collected_moments_are_those_of_the_rows(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    model, batches = tiny_model("llama"), random_batches(9, lengths=(12, 7))
    adapter, linear = architecture_for("llama"), model.model.layers[2].mlp.down_proj
    rows = [{name: each[row : row + 1] for name, each in batch.items()} for batch in batches for row in range(2)]
    apart = [bool(row) for batch in held_out_rows(batches) for row in batch]
    assert sum(apart) == 3  # an eighth of 18
    seen, held_out = (
        inputs_of(model, linear, [row for row, held in zip(rows, apart, strict=True) if held is wanted])
        for wanted in (False, True)
    )
    with ChannelMoments.of(0) as moments:  # all of it in files
        collect_moments(LayerRuns.of(model, adapter, batches), moments, progress=False)
        found = moments["2.mlp"]
        assert moments.stats.keys() == {f"{layer}.{name}" for layer in range(4) for name in ("attention", "mlp")}
    expected = collect_statistics(model, adapter, batches, progress=False)["2.mlp"]
    torch.testing.assert_close(found.seen, seen.T @ seen, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.held_out, held_out.T @ held_out, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.stats.mean, expected.mean)
    torch.testing.assert_close(found.stats.variance, expected.variance)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.ordered(order).seen, (seen.T @ seen)[order][:, order], rtol=1e-5, atol=1e-4)


def test_rows_are_held_out_by_what_they_say_alone(random_batches: RandomBatches) -> None:
    batches = random_batches(10, lengths=(12, 7))
    other = [{name: torch.cat([each, each[:, :3]], dim=1) for name, each in batch.items()} for batch in batches[::-1]]
    for batch in other:
        batch["attention_mask"][:, 12:] = 0  # more padding
    found, again = held_out_rows(batches), held_out_rows(other)
    assert sum(int(rows.sum()) for rows in found) == 3
    assert all(torch.equal(rows, same) for rows, same in zip(found, again[::-1], strict=True))
    assert not held_out_rows(random_batches(1, rows=1))[0].any()
    assert int(held_out_rows(random_batches(1, rows=2))[0].sum()) == 1


def test_moments_that_are_not_finite_are_named(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    model = tiny_model("llama")
    runs = LayerRuns.of(model, architecture_for("llama"), random_batches(2))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.inf
    with ChannelMoments.of(1e9) as moments, pytest.raises(DataError, match="activations of 1.mlp are NaN or infinite"):
        collect_moments(runs, moments, progress=False)


def linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
