"""Channel groups of every adapter, witnessed from outside: by torch-pruning's graph, and by what the model computes.

One line per architecture in ``GRAPH`` says what torch-pruning finds; an architecture that is not there is proved by
outputs alone. All are proved by outputs.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.models.adapter import ArchitectureAdapter, ChannelGroup
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.testing.random_models import random_model
from support.architectures import CONFIGS

# Groups whose members torch-pruning's graph finds where every query head has its own keys and values.
GRAPH = {
    "llama": ("attention", "mlp"),
    "mistral": ("attention", "mlp"),
    "qwen2": ("attention", "mlp"),
    "qwen3": ("attention", "mlp"),
    "phi3": ("attention", "mlp"),
}
# Where query heads share keys and values, its graph ends behind v_proj, or walking it does not end.
GROUPED = ("llama", "qwen3")
DENSE = sorted(
    name for name in CONFIGS if "num_local_experts" not in CONFIGS[name] and "num_experts" not in CONFIGS[name]
)


def graph_of(model: PreTrainedModel) -> torch_pruning.DependencyGraph:
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of parameters outside the modules that it knows
        return torch_pruning.DependencyGraph().build_dependency(
            model, example_inputs=torch.randint(3, 97, (1, 6)), output_transform=lambda output: output.logits
        )


def members(graph: Any, linear: nn.Linear, prune: Any, size: int) -> dict[tuple[nn.Module, bool], Any]:
    """Return what goes along with all channels of a linear: by module and whether its rows go, the group's item."""
    group = graph.get_pruning_group(linear, prune, idxs=list(range(size)))
    found = {}
    for item in group:
        if isinstance(item.dep.target.module, nn.Linear):
            found[item.dep.target.module, item.dep.handler == torch_pruning.prune_linear_out_channels] = item
    return found


def model_of(model_type: str, **changes: Any) -> tuple[PreTrainedModel, ArchitectureAdapter]:
    model = random_model(CONFIGS[model_type] | changes)
    return model, architecture_for(model_type)


@pytest.mark.parametrize("model_type", sorted(GRAPH))
def test_torch_pruning_s_graph_has_the_same_members(model_type: str) -> None:
    heads = CONFIGS[model_type]["num_attention_heads"]
    model, adapter = model_of(model_type, num_key_value_heads=heads)
    graph, layer = graph_of(model), adapter.layers(model)[1]
    groups = {group.name: group for group in adapter.channel_groups(model.config)}
    assert set(groups) == set(GRAPH[model_type])
    for name in GRAPH[model_type]:
        group = groups[name]
        consumer = layer.get_submodule(group.consumer.path)
        found = members(graph, consumer, torch_pruning.prune_linear_in_channels, group.channels)
        wanted = {(layer.get_submodule(axis.path), True) for axis in group.producers} | {(consumer, False)}
        assert set(found) == wanted
        for axis in group.producers:
            module = layer.get_submodule(axis.path)
            if len([each for each in group.producers if each.path == axis.path]) > 1:
                continue  # fused: its graph has one run of channels where there are several
            item = found[module, True]
            units = [channel // axis.channels_per_unit for channel in item.idxs]
            assert units == [channel // group.consumer.channels_per_unit for channel in item.root_idxs]


@contextmanager
def given_up_after(seconds: int) -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("model_type", GROUPED)
def test_torch_pruning_s_graph_is_wrong_where_heads_share_keys_and_values(model_type: str) -> None:
    """Why adapters are not derived from it, and are proved by outputs below; fails once torch-pruning has learnt it."""
    model, adapter = model_of(model_type)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    layer, graph = adapter.layers(model)[1], graph_of(model)
    group = next(group for group in adapter.channel_groups(model.config) if group.name == "attention")
    wanted = {(layer.get_submodule(axis.path), True) for axis in group.producers}
    wanted.add((layer.get_submodule(group.consumer.path), False))
    value, found = layer.self_attn.v_proj, None
    try:
        with given_up_after(2):  # the walk goes round in circles
            found = set(members(graph, value, torch_pruning.prune_linear_out_channels, value.out_features))
    except TimeoutError:
        pass
    assert found != wanted


def test_torch_pruning_s_graph_takes_the_norms_of_qwen3_along() -> None:
    """q_norm and k_norm hold one weight per channel of a head, which all heads share: no head may take any with it."""
    model, adapter = model_of("qwen3", num_key_value_heads=CONFIGS["qwen3"]["num_attention_heads"])
    layer, graph = adapter.layers(model)[1], graph_of(model)
    head = list(range(model.config.head_dim))
    items = graph.get_pruning_group(layer.self_attn.o_proj, torch_pruning.prune_linear_in_channels, idxs=head)
    shared = [layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight]
    taken = [item.idxs for item in items if any(item.dep.target.module is weight for weight in shared)]
    assert taken == [head, head]  # that is, all of both weights, for one head of eight
    assert not any(group.norms for group in adapter.channel_groups(model.config))


def channels_that_change(
    model: PreTrainedModel, layer: nn.Module, group: ChannelGroup, perturb: dict[str, Tensor]
) -> set[int]:
    """Return the consumer's input channels that differ once rows of the producers, by path, are disturbed."""
    consumer, tokens = layer.get_submodule(group.consumer.path), torch.arange(3, 15)[None]
    seen: list[Tensor] = []
    handle = consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).clone()))
    kept = {path: layer.get_submodule(path).weight.clone() for path in perturb}
    with torch.no_grad():
        for strength in (0, 3, -3):  # one sign alone may leave a ReLU closed
            for path, rows in perturb.items():
                noise = torch.randn(len(rows), kept[path].shape[1], generator=torch.Generator().manual_seed(0))
                layer.get_submodule(path).weight[rows] += strength * noise
            model(tokens, use_cache=False)
            for path, weight in kept.items():
                layer.get_submodule(path).weight.copy_(weight)
    handle.remove()
    before, *after = seen
    change = sum((before - each).abs().amax(dim=0) for each in after)
    return set((change > 1e-6).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("model_type", DENSE)
def test_the_rows_of_a_unit_reach_the_columns_of_that_unit_and_no_other(model_type: str) -> None:
    """Disturb the rows that an adapter gives to a unit, in the running model, and see which channels arrive changed."""
    model, adapter = model_of(model_type)
    layer = adapter.layers(model)[1]
    for group in adapter.channel_groups(model.config):
        if group.norms:
            continue  # a norm over all channels carries every unit into every other; see the conformance suite
        for unit in (0, 1, group.units - 1):
            rows: dict[str, list[Tensor]] = {}
            for axis in group.producers:
                rows.setdefault(axis.path, []).append(axis.channels(torch.tensor([unit])))
            disturbed = {path: torch.cat(parts) for path, parts in rows.items()}
            wanted = set(group.consumer.channels(torch.tensor([unit])).tolist())
            assert channels_that_change(model, layer, group, disturbed) == wanted, f"{group.name}, unit {unit}"
