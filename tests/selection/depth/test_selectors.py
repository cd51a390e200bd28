"""Published selectors against loops over tokens, weights and layers that share no code with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.depth.layer_importance import block_influence, scores_without, taylor
from amoeba_plugin.selection.depth.lockstep_contract import check_contract
from amoeba_plugin.selection.depth.selectors import random_depths
from amoeba_plugin.selection.depth.task import DepthTask, SearchOptions
from amoeba_plugin.selection.objectives import PerTokenLoss
from amoeba_plugin.selection.registry import depth_selector_named, objective_named

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]


def select(name: str, model: PreTrainedModel, batches: list[Batch], min_depth: int, **options: Any) -> DepthStrategy:
    adapter = architecture_for(model.config.model_type)
    objective = objective_named(options.pop("objective", "loss"))
    task = DepthTask(model, adapter, objective, batches, min_depth=min_depth, progress=False, **options)
    return depth_selector_named(name).select(task)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_block_influence_equals_a_loop_over_tokens(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str
) -> None:
    model = tiny_model(model_type)
    batches = random_batches(2, 2, 10, lengths=(10, 6))
    sums, tokens = [0.0] * 4, 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            states = hidden_states(model, ids[: int(mask.sum())])
            tokens += int(mask.sum())
            for index, (x, y) in enumerate(pairwise(states)):
                for t in range(len(x)):
                    sums[index] += (x[t] @ y[t] / (x[t].norm() * y[t].norm())).item()
    wanted = [1 - total / tokens for total in sums]
    assert block_influence(model, architecture_for(model_type), batches) == pytest.approx(wanted, abs=1e-5)
    ranked = sorted(range(3), key=wanted.__getitem__)  # the last layer stays
    strategy = select("block_influence", model, batches, 2)
    assert strategy.kept == {4: (0, 1, 2, 3), 3: tuple(sorted({*ranked[1:], 3})), 2: tuple(sorted({*ranked[2:], 3}))}
    assert strategy.metric == {}
    ranked = sorted(range(4), key=wanted.__getitem__)
    assert select("block_influence", model, batches, 1, keep_last=0).kept[1] == tuple(ranked[3:])


def hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return the states before every layer and behind the last one, unpadded and not normed: (positions, hidden)."""
    last: list[Tensor] = []  # transformers' own list ends with the normed states
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        states = model(ids[None], use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    return [each[0] for each in (*states[:-1], *last)]


def test_block_influence_needs_tokens(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    with pytest.raises(DataError, match="no token to measure block influence on"):
        block_influence(tiny_model("llama"), architecture_for("llama"), random_batches(1, lengths=(0, 0)))


@pytest.mark.parametrize(
    ("keep_last", "kept"),
    [
        (0, {6: (0, 1, 2, 3, 4, 5), 5: (0, 1, 2, 3, 4), 4: (0, 1, 2, 3)}),
        (1, {6: (0, 1, 2, 3, 4, 5), 5: (0, 1, 2, 3, 5), 4: (0, 1, 2, 5)}),
        (2, {6: (0, 1, 2, 3, 4, 5), 5: (0, 1, 2, 4, 5), 4: (0, 1, 4, 5)}),
    ],
)
def test_the_last_layers_go_but_the_very_last(
    tiny_model: TinyModel, random_batches: RandomBatches, keep_last: int, kept: dict[int, tuple[int, ...]]
) -> None:
    assert select("last_layers", tiny_model("llama", layers=6), random_batches(), 4, keep_last=keep_last).kept == kept


def test_the_dynamic_program_is_one_of_them(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    found = select("dynamic_program", tiny_model("llama"), random_batches(), 2, options=SearchOptions(exchanges=1))
    assert list(found.kept) == list(found.metric) == [4, 3, 2]


def test_random_layers_follow_the_seed() -> None:
    depths = list(range(1, 12))
    drawn = random_depths(12, depths, seed=1).kept
    assert drawn == random_depths(12, depths, seed=1).kept
    assert drawn != random_depths(12, depths, seed=2).kept
    for count, kept in drawn.items():
        assert len(set(kept)) == len(kept) == count
        assert kept == tuple(sorted(kept))
        assert set(kept) <= set(range(12))
    assert random_depths(12, [5], seed=1).kept[5] == drawn[5]  # whatever other depths are asked for


def least_first(scores: list[Any], removable: range, layers: int, min_depth: int) -> dict[int, tuple[int, ...]]:
    """Restate: for every depth, the layers that go are those with the least scores."""
    order = sorted(removable, key=lambda index: scores[index])
    return {
        depth: tuple(sorted(set(range(layers)) - set(order[: layers - depth])))
        for depth in range(layers, min_depth - 1, -1)
    }


def without(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    model = copy.deepcopy(model)
    del model.model.layers[layer]
    model.config.num_hidden_layers -= 1
    return model


def mean_loss(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    """Return transformers' own loss, weighted by the targets of each batch."""
    targets = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    return sum(loss * count for loss, count in zip(losses, targets, strict=True)) / sum(targets)


@pytest.mark.parametrize("objective", ["loss", "perplexity"])
def test_one_shot_equals_a_loop_over_models_whose_layers_are_deleted(
    tiny_model: TinyModel, random_batches: RandomBatches, objective: str
) -> None:
    model, batches = tiny_model("llama", layers=5), random_batches(2, 2, 10, lengths=(10, 6))
    with torch.no_grad():
        losses = [mean_loss(without(model, layer), batches).item() for layer in range(5)]
    found = select("one_shot", model, batches, 2, objective=objective, keep_last=2)
    assert found.kept == least_first(losses, range(3), 5, 2)
    assert len(model.model.layers) == model.config.num_hidden_layers == 5


def layers_run(run: Callable[[], object]) -> int:
    """Return how many decoder layers of a Llama something runs, counted for every row."""
    rows = []
    forward = LlamaDecoderLayer.forward

    def counting(self: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(states))
        return forward(self, states, *args, **kwargs)

    with mock.patch.object(LlamaDecoderLayer, "forward", counting):
        run()
    return sum(rows)


@pytest.mark.parametrize("layers", [1, 6])
def test_leaving_every_layer_out_runs_what_is_before_it_once(
    tiny_model: TinyModel, random_batches: RandomBatches, layers: int
) -> None:
    model, batches = tiny_model("llama", layers=layers), random_batches(3, 2, 10, lengths=(10, 6))
    adapter, found = architecture_for("llama"), []
    before = layers_run(lambda: check_contract(model, adapter, batches))
    ran = layers_run(lambda: found.extend(scores_without(model, adapter, PerTokenLoss(), batches, progress=False)))
    assert ran - before == 2 * 3 * (layers + layers * (layers - 1) / 2)
    with torch.no_grad():
        losses = [mean_loss(without(model, layer), batches).item() for layer in range(layers)]
    assert [score.value for score in found] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("name", ["block_influence", "angular_distance", "one_shot"])
def test_a_selector_shows_how_far_it_is_unless_it_shall_not(
    tiny_model: TinyModel, random_batches: RandomBatches, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model, batches = tiny_model("llama"), random_batches(3)
    for progress in (False, True):
        task = DepthTask(model, architecture_for("llama"), PerTokenLoss(), batches, 2, progress=progress)
        depth_selector_named(name).select(task)
        shown = capsys.readouterr().err
        assert (("12/12" if name == "one_shot" else "3/3") in shown) == progress


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["taylor", "taylor_plus"])
def test_taylor_equals_one_backward_pass(
    tiny_model: TinyModel, random_batches: RandomBatches, model_type: str, name: str
) -> None:
    model, batches = tiny_model(model_type, layers=9), random_batches(3, 2, 10, lengths=(10, 6))
    plain = copy.deepcopy(model)
    mean_loss(plain, batches).backward()
    scores = []
    for layer in plain.model.layers:
        linears = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        assert len(linears) == 7
        scores.append(sum((weight.grad * weight).abs().sum().item() for weight in linears))
    assert taylor(model, architecture_for(model_type), batches, progress=False) == pytest.approx(scores, rel=1e-4)
    removable = range(4, 7) if name == "taylor_plus" else range(8)
    assert select(name, model, batches, 6).kept == least_first(scores, removable, 9, 6)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["magnitude", "magnitude_plus"])
def test_magnitude_equals_a_loop_over_weights(tiny_model: TinyModel, name: str) -> None:
    model = tiny_model("qwen3", layers=9)
    scores = [
        sum(module.weight.abs().sum().item() for module in layer.modules() if isinstance(module, nn.Linear))
        for layer in model.model.layers
    ]
    removable = range(4, 7) if name == "magnitude_plus" else range(8)
    assert select(name, model, [], 6).kept == least_first(scores, removable, 9, 6)


@pytest.mark.parametrize("left", [False, True])
def test_angular_distance_equals_a_loop_over_runs_of_layers(
    tiny_model: TinyModel, random_batches: RandomBatches, left: bool
) -> None:
    model, batches = tiny_model("llama", layers=6), random_batches(2, 2, 10, lengths=(10, 6))
    last = [
        [each[-1] for each in hidden_states(model, ids[: int(mask.sum())])]
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]

    def distance(first: int, count: int) -> float:
        angles = [
            math.acos(states[first] @ states[first + count] / (states[first].norm() * states[first + count].norm()))
            for states in last
        ]
        return sum(angles) / len(angles) / math.pi

    if left:
        batches = [{name: column.flip(1) for name, column in batch.items()} for batch in batches]
        batches = [batch | {"input_ids": unflipped(batch["input_ids"], batch["attention_mask"])} for batch in batches]
    found = select("angular_distance", model, batches, 2, keep_last=1)
    assert list(found.kept) == [6, 5, 4, 3, 2]
    assert found.kept[6] == tuple(range(6))
    for depth, kept in list(found.kept.items())[1:]:
        count = 6 - depth
        first = min(range(5 - count + 1), key=lambda first, count=count: distance(first, count))
        assert kept == tuple(index for index in range(6) if not first <= index < first + count)


def unflipped(ids: Tensor, mask: Tensor) -> Tensor:
    """Put the tokens of rows that were reversed, padding included, into their order again."""
    ids = ids.clone()
    for row, present in zip(ids, mask.bool(), strict=True):
        row[present] = row[present].flip(0)
    return ids


@pytest.mark.parametrize("name", ["taylor_plus", "magnitude_plus"])
def test_protected_layers_leave_too_few(tiny_model: TinyModel, random_batches: RandomBatches, name: str) -> None:
    with pytest.raises(RecipeError, match=r"keeps the first 4 and the last 2 of the 8 layers, so that 2 can go, and "):
        select(name, tiny_model("llama", layers=8), random_batches(), 5)
    assert list(select(name, tiny_model("llama", layers=8), random_batches(), 6).kept) == [8, 7, 6]


@pytest.mark.parametrize("name", ["block_influence", "one_shot", "taylor", "angular_distance", "magnitude"])
def test_scores_that_are_not_finite_or_all_the_same_are_refused(
    tiny_model: TinyModel, random_batches: RandomBatches, name: str
) -> None:
    model = tiny_model("llama", layers=3)
    with torch.no_grad():
        for layer in model.model.layers:  # three layers that do nothing, and have the same weights
            for (_, weight), (_, first) in zip(
                layer.named_parameters(), model.model.layers[0].named_parameters(), strict=True
            ):
                weight.copy_(first)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight[0, 0] = layer.mlp.down_proj.weight[0, 0] = 0
    if name not in ("block_influence", "angular_distance"):  # rounding may tell equal directions apart
        with pytest.raises(DataError, match=rf"selector {name} gives .* to all 3 layers: it cannot tell them apart"):
            select(name, model, random_batches(), 2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(DataError, match=r"layer 1 is|layer 0 is|gradient of \d\.\S+ is NaN or infinite on .* batch 0"):
        select(name, model, random_batches(), 2)
