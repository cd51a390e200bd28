"""Searches with removed layers folded: against subnets whose weights are changed, run whole by their host."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.depth.steps import Removed
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.hidden_states import states_out_of
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import depth_selector_named, objective_named
from amoeba_plugin.selection.repair.depth import RIDGE, removed_runs
from amoeba_plugin.selection.repair.fold_table import FoldTable, parted
from amoeba_plugin.testing.random_models import random_model
from support.architectures import CONFIGS

Batches = Callable[..., list[dict[str, Tensor]]]


def states_of(
    model: PreTrainedModel, adapter: ArchitectureAdapter, batches: list[Batch], front: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the neurons of one layer, and the states behind every layer, of all tokens that are no padding."""
    group = next(each for each in adapter.channel_groups(model.config) if each.name == "mlp")
    neurons: list[Tensor] = []
    behind: list[list[Tensor]] = [[] for _ in adapter.layers(model)]
    for batch in batches:
        present = batch["attention_mask"].bool().flatten()

        def keep(to: list[Tensor], states: Tensor, present: Tensor = present) -> None:
            to.append(states.reshape(len(present), -1)[present].double())

        linear = adapter.layers(model)[front].get_submodule(group.consumer.path)
        hooks = [linear.register_forward_pre_hook(lambda _, args, keep=keep: keep(neurons, args[0]))]
        for layer, to in zip(adapter.layers(model), behind, strict=True):
            hooks.append(
                layer.register_forward_hook(lambda _, args, out, to=to, keep=keep: keep(to, states_out_of(out)))
            )
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for hook in hooks:
            hook.remove()
    return torch.cat(neurons), [torch.cat(each) for each in behind]


def regressed(
    model: PreTrainedModel, adapter: ArchitectureAdapter, batches: list[Batch], front: int, end: int
) -> Tensor:
    """A by torch's own regression on rows, from the whole model's states: ``|D - A a|^2 / |h|^2 + ridge |A|^2``."""
    a, behind = states_of(model, adapter, batches, front)
    weights = 1 / behind[front].norm(dim=-1, keepdim=True)
    rows, targets = a * weights, (behind[end - 1] - behind[front]) * weights
    scale = rows.square().sum(dim=0).mean()
    ridge = (RIDGE * scale).sqrt() * torch.eye(a.shape[1]).double()
    zeros = torch.zeros(a.shape[1], targets.shape[1]).double()
    found: Tensor = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([targets, zeros])).solution.T
    return found


def scored_by_hand(
    model: PreTrainedModel, adapter: ArchitectureAdapter, fitting: list[Batch], judging: list[Batch], removed: Removed
) -> float:
    """The loss of a copy without some layers, whose MLPs in front of them have changed weights."""
    other, layers = copy.deepcopy(model), len(adapter.layers(model))
    kept = tuple(index for index in range(layers) if index not in removed)
    group = next(each for each in adapter.channel_groups(model.config) if each.name == "mlp")
    share = adapter.residual_share(model.config)
    assert share is not None
    for front, gone in removed_runs(kept, layers).items():
        change = regressed(model, adapter, fitting, front, gone.stop) / share
        group.consumer.weight(adapter.layers(other)[front]).data += change.float()
    adapter.set_layers(other, [adapter.layers(other)[index] for index in kept], kept, other.config)
    return objective_named("loss").measure(other, judging).value


@pytest.mark.parametrize("model_type", ["llama", "opt", "granite", "gpt_neox", "smollm3"])
def test_candidates_are_scored_with_what_their_layers_in_front_add(model_type: str, random_batches: Batches) -> None:
    model, adapter = random_model(CONFIGS[model_type]), architecture_for(model_type)
    fitting, judging = random_batches(lengths=(9, 12)), random_batches(lengths=(7, 5))
    layers = len(adapter.layers(model))
    with FoldTable.of(LayerRuns.of(model, adapter, fitting)) as folds:
        assert folds is not None
        task = DepthTask(model, adapter, objective_named("loss"), judging, 1, 0, progress=False, folds=folds)
        found = depth_selector_named("greedy").select(task)
    assert len(found.kept) == layers
    for depth, kept in found.kept.items():
        removed = Removed(range(layers)) - set(kept)
        expected = scored_by_hand(model, adapter, fitting, judging, removed)
        assert found.metric[depth] == pytest.approx(expected, abs=2e-4), removed


def test_what_searches_for_the_layers_may_be_no_searched_data(random_batches: Batches) -> None:
    """Rows fit or judge by their tokens, whatever batches they come in."""
    batches = random_batches(3, rows=8)
    fitting, judging = parted(batches)
    again = [{name: each[row : row + 1] for name, each in batch.items()} for batch in batches[::-1] for row in range(8)]
    other_fitting, other_judging = parted(again)

    def rows(some: list[Batch]) -> set[tuple[int, ...]]:
        return {tuple(row.tolist()) for batch in some for row in batch["input_ids"]}

    assert rows(fitting) == rows(other_fitting)
    assert rows(judging) == rows(other_judging)
    assert len(rows(judging)) == 8
    assert rows(fitting) | rows(judging) == rows(batches)
    assert not rows(fitting) & rows(judging)


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral"])
def test_where_nothing_can_be_folded_there_is_no_table(model_type: str, random_batches: Batches) -> None:
    model = random_model(CONFIGS[model_type])
    with FoldTable.of(LayerRuns.of(model, architecture_for(model_type), random_batches())) as folds:
        assert folds is None
