"""The search on models, against models whose layers are really deleted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.depth.layer_importance import keeping
from amoeba_plugin.selection.depth.task import DepthTask, SearchOptions
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, PerTokenLoss, Score
from amoeba_plugin.selection.registry import depth_selector_named
from support.deleted_layers import SLIDING, deleted, plain_loss, recurrence
from support.depth_search import searched

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]


@pytest.mark.parametrize(
    ("model_type", "layers", "min_depth", "keep_last", "overrides"),
    [
        ("llama", 5, 2, 1, {}),
        ("llama", 6, 1, 0, {}),
        ("mistral", 5, 3, 3, {"sliding_window": 5}),
        ("qwen2", 5, 2, 1, SLIDING),
        ("qwen3", 6, 2, 2, SLIDING),
    ],
)
def test_the_search_is_the_recurrence_on_models_whose_layers_are_deleted(
    tiny_model: TinyModel,
    random_batches: RandomBatches,
    model_type: str,
    layers: int,
    min_depth: int,
    keep_last: int,
    overrides: dict[str, Any],
) -> None:
    model = tiny_model(model_type, seed=layers, layers=layers, **overrides)
    batches = random_batches(2, 2, 14, lengths=(14, 9))
    found = searched(
        model,
        architecture_for(model_type),
        PerTokenLoss(),
        batches,
        min_depth=min_depth,
        keep_last=keep_last,
        progress=False,
    )

    def scored(removed: frozenset[int]) -> tuple[float, float]:
        loss = plain_loss(deleted(model, removed), batches)
        return loss, loss

    wanted = recurrence(layers - keep_last, layers - min_depth, scored)
    assert found.objective == "loss"
    assert list(found.kept) == list(found.metric) == list(range(layers, min_depth - 1, -1))
    assert found.kept[layers] == tuple(range(layers))
    assert found.metric[layers] == pytest.approx(plain_loss(model, batches), rel=1e-6)
    for count, (removed, (loss, _)) in wanted.items():
        assert found.kept[layers - count] == tuple(i for i in range(layers) if i not in removed)
        assert found.metric[layers - count] == pytest.approx(loss, rel=1e-6)
        assert set(range(layers - keep_last, layers)) <= set(found.kept[layers - count])


def test_accuracy_drives_the_search_through_the_model(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    model, batches = tiny_model("llama", seed=1), random_batches(8, 4)
    for number, batch in enumerate(batches):
        batch["question"], batch["is_answer"] = torch.full((4,), number), torch.tensor([0, 0, 1, 0])
    found = searched(model, architecture_for("llama"), MultipleChoiceAccuracy(), batches, min_depth=2, progress=False)
    for kept, metric in zip(found.kept.values(), found.metric.values(), strict=True):
        subnet = deleted(model, frozenset(range(4)) - frozenset(kept))
        assert MultipleChoiceAccuracy().measure(subnet, batches).value == metric


class Failing(PerTokenLoss):
    """Breaks in the middle of the search."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def measure(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Score:
        self.calls -= 1
        if not self.calls:
            raise KeyboardInterrupt
        return super().measure(model, batches)


class FailingToObserve(PerTokenLoss):
    """Breaks in the middle of a step."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def observe(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        self.calls -= 1
        if not self.calls:
            raise KeyboardInterrupt
        return super().observe(model, batch)


@pytest.mark.parametrize("objective", [Failing, FailingToObserve])
@pytest.mark.parametrize("calls", [1, 2, 5, 100])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_model_is_restored_after_an_exception_too(
    tiny_model: TinyModel,
    random_batches: RandomBatches,
    model_type: str,
    calls: int,
    objective: type[Failing | FailingToObserve],
) -> None:
    model = tiny_model(model_type, **(SLIDING if model_type == "qwen2" else {})).train()
    layers, config = list(model.model.layers), model.config.to_dict()

    def search() -> None:
        searched(model, architecture_for(model_type), objective(calls), random_batches(), min_depth=2, progress=False)

    if calls == 100:
        search()
    else:
        with pytest.raises(KeyboardInterrupt):
            search()
    assert all(now is before for now, before in zip(model.model.layers, layers, strict=True))
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(4))
    assert model.config.to_dict() == config
    assert all(module.training for module in model.modules())
    assert not any(layer._forward_hooks or "forward" in vars(layer) for layer in layers)


class Given(PerTokenLoss):
    """Scores in the order they are asked for; the whole model first."""

    def __init__(self, *values: float) -> None:
        self.values = iter(values)

    def measure(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Score:
        value = next(self.values)
        return Score(value, value)


def given_search(tiny_model: TinyModel, random_batches: RandomBatches, *values: float) -> DepthStrategy:
    model = tiny_model("llama", layers=3)
    return searched(
        model, architecture_for("llama"), Given(*values), random_batches(), min_depth=1, keep_last=0, progress=False
    )


def test_nan_is_worst_even_in_a_cell_that_has_no_other(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    # asked in this order: {2}; {1}, {1,2}; {0}, and {0} with the best single removed before (layer 1)
    found = given_search(tiny_model, random_batches, 1.0, math.nan, 2.0, math.nan, math.inf, 3.0)
    assert found.kept == {3: (0, 1, 2), 2: (0, 2), 1: (2,)}
    assert found.metric == {3: 1.0, 2: 2.0, 1: 3.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([math.nan], "loss of the whole model is nan: nothing can be compared with it"),
        ([1.0] + [math.nan] * 5, "loss is NaN or infinite without any of the layers"),
        ([1.0] + [2.0] * 5, "loss is 2.0 for all 5 candidates: it cannot tell layers apart"),
    ],
)
def test_an_objective_that_says_nothing_is_refused(
    tiny_model: TinyModel, random_batches: RandomBatches, values: list[float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        given_search(tiny_model, random_batches, *values)


@pytest.mark.parametrize(
    ("min_depth", "keep_last", "message"),
    [
        (4, 1, r"min_depth 4 is impossible: the model has 4 layers; take 1\.\.3"),
        (0, 0, r"min_depth 0 is impossible: the model has 4 layers; take 1\.\.3"),
        (2, 3, r"keep_last 3 is impossible with min_depth 2: .* take 0\.\.2"),
        (2, -1, r"keep_last -1 is impossible"),
    ],
)
def test_impossible_depths_are_refused_before_anything_runs(
    tiny_model: TinyModel, random_batches: RandomBatches, min_depth: int, keep_last: int, message: str
) -> None:
    model, adapter = tiny_model("llama"), architecture_for("llama")
    with pytest.raises(RecipeError, match=message):
        searched(model, adapter, Failing(1), random_batches(), min_depth=min_depth, keep_last=keep_last)


def test_the_objective_s_check_comes_first(tiny_model: TinyModel, random_batches: RandomBatches) -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="lacks question, is_answer"):
        searched(model, architecture_for("llama"), MultipleChoiceAccuracy(), random_batches(), min_depth=2)


@pytest.mark.parametrize("granularity", ["layer", "sublayer"])
def test_all_ways_together_are_never_worse_than_any_of_them(
    tiny_model: TinyModel, random_batches: RandomBatches, granularity: Any
) -> None:
    model, batches, ways = (
        tiny_model("llama", layers=8, seed=3),
        random_batches(3),
        ("dynamic_program", "greedy", "lazy_greedy", "auto"),
    )
    adapter, objective = architecture_for("llama"), PerTokenLoss()
    task = DepthTask(model, adapter, objective, batches, 4, 1, False, SearchOptions(granularity=granularity))
    found = {name: depth_selector_named(name).select(task) for name in (*ways, "block_influence", "angular_distance")}
    for name, strategy in found.items():
        assert strategy.selector == name
        for depth in strategy.kept:
            if depth != 8:
                with keeping(model, adapter, strategy.kept[depth], strategy.lost.get(depth)):
                    loss = plain_loss(model, batches)
                assert found["auto"].metric[depth] <= loss + 1e-5, (name, depth)
                if name in ways:
                    assert strategy.metric[depth] == pytest.approx(loss, rel=1e-4)
    greedy = found["greedy"]
    assert all(
        set(greedy.removed(depth + 1)) <= set(greedy.removed(depth)) for depth in (4, 5, 6, 7) if not greedy.lost
    )
    assert found["auto"].search["layer_forwards"] <= 2.2 * greedy.search["layer_forwards"]
