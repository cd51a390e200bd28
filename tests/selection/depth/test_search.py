"""The dynamic program against a recursive reading of the recurrence, on models whose layers are really deleted."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.deleted_layers import SLIDING, deleted, plain_loss, recurrence
from support.depth_search import searched
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.depth.dynamic_program import Search, Table, evaluations, exchange_evaluations
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy, Objective, PerTokenLoss, Score

Batch = dict[str, Tensor]
TinyModel = Callable[..., PreTrainedModel]
RandomBatches = Callable[..., list[Batch]]


def shrink(
    candidates: int, most: int, evaluate: Callable[[frozenset[int]], Score], objective: Objective, beam: int = 1
) -> Table:
    return Search(lambda sets: [evaluate(removed) for removed in sets], objective).shrink(candidates, most, beam)


def exchange(
    removed: frozenset[int],
    score: Score,
    candidates: int,
    evaluate: Callable[[frozenset[int]], Score],
    objective: Objective,
    rounds: int,
) -> tuple[frozenset[int], Score]:
    search = Search(lambda sets: [evaluate(each) for each in sets], objective)
    return search.exchange({len(removed): (removed, score)}, candidates, rounds)[len(removed)]


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


class Tabulated(Objective):
    """Scores drawn for each set of kept layers, without a look at the data."""

    name, unit, larger_is_better = "tabulated", "points", True

    def check(self, batches: Sequence[Batch]) -> None:
        pass

    def measure(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Score:
        raise NotImplementedError


@given(st.integers(1, 7), st.data(), st.integers(0, 10_000), st.booleans())
def test_the_program_is_the_recurrence_on_any_table(candidates: int, data: st.DataObject, seed: int, nan: bool) -> None:
    most = data.draw(st.integers(1, candidates))
    asked: list[frozenset[int]] = []
    values = [0.25, 0.5, 0.75, *([math.nan, math.inf] if nan else [])]  # few values: ties are common

    def evaluate(removed: frozenset[int]) -> Score:
        rng = random.Random(f"{seed} {sorted(removed)}")
        asked.append(removed)
        return Score(rng.choice(values), rng.choice([1.0, 2.0, 3.0, math.nan]))

    def scored(removed: frozenset[int]) -> tuple[float, float]:
        score = evaluate(removed)
        return tuple(x if math.isfinite(x) else math.inf for x in (-score.value, score.loss))

    try:
        table = shrink(candidates, most, evaluate, Tabulated())
    except DataError:
        return  # nothing finite, or all the same
    assert len(asked) == candidates * most - most * (most - 1) // 2
    wanted = recurrence(candidates, most, scored)
    assert {count: removed for count, (removed, _) in table.items()} == {
        m: removed for m, (removed, _) in wanted.items()
    }
    assert all(len(removed) == count for count, (removed, _) in table.items())


@pytest.mark.parametrize(
    ("candidates", "most", "expected"), [(31, 12, 306), (31, 16, 376), (32, 16, 392), (32, 12, 318)]
)
def test_the_paper_s_settings_take_the_evaluations_it_counts(candidates: int, most: int, expected: int) -> None:
    asked = []
    shrink(candidates, most, lambda removed: asked.append(removed) or Score(float(sum(removed)), 0.0), Tabulated())
    assert len(asked) == evaluations(candidates, most) == expected


@given(st.integers(1, 7), st.data(), st.integers(0, 10_000))
def test_a_beam_as_wide_as_the_table_finds_the_best_of_all_sets(
    candidates: int, data: st.DataObject, seed: int
) -> None:
    most = data.draw(st.integers(1, candidates))
    asked: list[frozenset[int]] = []

    def evaluate(removed: frozenset[int]) -> Score:
        asked.append(removed)
        return Score(random.Random(f"{seed} {sorted(removed)}").random(), 0.0)

    wide = math.comb(candidates, candidates // 2)
    found = shrink(candidates, most, evaluate, Tabulated(), beam=wide)
    assert len(asked) == len(set(asked)) == evaluations(candidates, most, wide)
    for count, (removed, score) in found.items():
        sets = [frozenset(each) for each in itertools.combinations(range(candidates), count)]
        assert removed == max(sets, key=lambda each: evaluate(each).value)
        assert score == evaluate(removed)


@given(st.integers(2, 7), st.data(), st.integers(0, 10_000))
def test_exchanges_end_where_no_single_one_is_better(candidates: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, candidates - 1))

    def evaluate(removed: frozenset[int]) -> Score:
        return Score(random.Random(f"{seed} {sorted(removed)}").random(), 0.0)

    start = frozenset(range(count))
    once, score = exchange(start, evaluate(start), candidates, evaluate, Tabulated(), rounds=1)
    neighbours = [frozenset(each) for each in itertools.combinations(range(candidates), count)]
    assert once == max((each for each in neighbours if len(each - start) <= 1), key=lambda each: evaluate(each).value)
    assert score == evaluate(once)
    last, score = exchange(start, evaluate(start), candidates, evaluate, Tabulated(), rounds=1000)
    assert len(last) == count
    assert all(evaluate(each).value <= score.value for each in neighbours if len(each - last) <= 1)


def test_exchanges_ask_for_every_neighbour_of_every_set_at_once() -> None:
    calls: list[int] = []

    def evaluate(sets: Sequence[frozenset[int]]) -> list[Score]:
        calls.append(len(sets))
        return [Score(-float(sum(removed)), 0.0) for removed in sets]  # the first layers go

    search = Search(evaluate, Tabulated())
    table = search.shrink(6, 3)
    assert calls == [1, 2, 3, 3, 3, 3]
    start = {count: (frozenset(range(6 - count, 6)), Score(-99.0, 0.0)) for count in table}
    assert {count: removed for count, (removed, _) in search.exchange(start, 6, rounds=9).items()} == {
        1: {0}, 2: {0, 1}, 3: {0, 1, 2},
    }  # fmt: skip
    assert calls[6] == exchange_evaluations(6, 3, rounds=1) == 5 + 8 + 9


@pytest.mark.parametrize(
    ("scores", "near"),
    [
        ((Score(1.0, 1.0), Score(1.0 + 2e-6, 1.0)), True),
        ((Score(1.0, 1.0), Score(1.0 + 2e-5, 1.0)), False),
        ((Score(0.5, 1.0), Score(0.5, 2.0)), False),  # questions answered right: the loss decides, and clearly
        ((Score(0.5, 1.0), Score(0.5, 1.0 + 2e-6)), True),
        ((Score(math.nan, 1.0), Score(math.nan, 1.0)), False),
    ],
)
def test_comparisons_within_rounding_are_remembered(scores: tuple[Score, Score], near: bool) -> None:
    search = Search(lambda sets: [scores[min(removed)] for removed in sets], PerTokenLoss())
    if math.isfinite(scores[0].value):
        kept = search.shrink(2, 1)[1][0]
        assert kept == {0}
    else:
        search._prefers(frozenset({0}), scores[0], frozenset({1}), scores[1])
    assert [(tie.preferred, tie.other) for tie in search.near_ties] == [({0}, {1})] * near


def test_a_beam_of_one_is_the_default() -> None:
    assert evaluations(31, 12) == evaluations(31, 12, beam=1) == 306


def test_ties_of_accuracy_are_broken_by_loss() -> None:
    losses = {frozenset({1}): 3.0, frozenset({0}): 2.0}
    table = shrink(2, 1, lambda removed: Score(0.5, losses[removed]), MultipleChoiceAccuracy())
    assert table[1] == (frozenset({0}), Score(0.5, 2.0))


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
