"""Published selectors against loops over tokens, weights and layers that share no code with them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.depth_selectors import DepthTask, random_depths
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.layer_scores import block_influence
from amoeba_plugin.plugins import architecture_for, depth_selector_named, objective_named
from amoeba_plugin.strategy import DepthStrategy

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
    found = select("dynamic_program", tiny_model("llama"), random_batches(), 2, options={"exchanges": 1})
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


@pytest.mark.parametrize("name", ["block_influence", "last_layers"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_depth": 4}, r"min_depth 4 is impossible: the model has 4 layers; take 1\.\.3"),
        ({"min_depth": 2, "keep_last": 3}, r"keep_last 3 is impossible with min_depth 2: .* take 0\.\.2"),
    ],
)
def test_impossible_depths_are_refused(
    tiny_model: TinyModel, random_batches: RandomBatches, name: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        select(name, tiny_model("llama"), random_batches(), **options)
