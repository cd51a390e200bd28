"""The published ways to choose the layers of every depth, which the dynamic program is compared with.

All rank layers once. What they rank by is in :mod:`amoeba_plugin.selection.depth.layer_importance`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import DataError, RecipeError
from amoeba_plugin.selection.depth.layer_importance import (
    angular_distances,
    block_influence,
    magnitude,
    scores_without,
    taylor,
)
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.objectives import badness

PROTECTED_FIRST, PROTECTED_LAST = 4, 2  # what the "+" of Shortened LLaMA means (arXiv:2402.02834, section 2.2)


def least_block_influence(task: DepthTask) -> DepthStrategy:
    """Remove the layers of least block influence first (ShortGPT, arXiv:2403.03853); nested."""
    removable = range(task.removable())
    scores = block_influence(task.model, task.adapter, task.batches, task.progress)
    return _least_first(task, "block_influence", scores, removable)


def one_shot(task: DepthTask) -> DepthStrategy:
    """Remove first the layers without which the objective is best, each left out alone; nested.

    With the objective loss or perplexity this is Shortened LLaMA's PPL, arXiv:2402.02834.
    """
    removable = range(task.removable())
    scores = scores_without(task.model, task.adapter, task.objective, task.batches, task.progress)
    found = _least_first(task, "one_shot", [badness(task.objective, score) for score in scores], removable)
    return replace(found, objective=task.objective.name)


def least_taylor(task: DepthTask) -> DepthStrategy:
    """Remove the layers with the least first-order Taylor importance first (Shortened LLaMA); nested."""
    removable = range(task.removable())
    return _least_first(task, "taylor", taylor(task.model, task.adapter, task.batches, task.progress), removable)


def least_taylor_plus(task: DepthTask) -> DepthStrategy:
    """As :func:`least_taylor`, but the first four and the last two layers stay (Shortened LLaMA's Taylor+)."""
    removable = _unprotected(task, "taylor")
    return _least_first(task, "taylor_plus", taylor(task.model, task.adapter, task.batches, task.progress), removable)


def least_magnitude(task: DepthTask) -> DepthStrategy:
    """Remove the layers with the least sum of absolute weights first (Shortened LLaMA); nested. No data is needed."""
    return _least_first(task, "magnitude", magnitude(task.model, task.adapter), range(task.removable()))


def least_magnitude_plus(task: DepthTask) -> DepthStrategy:
    """As :func:`least_magnitude`, but the first four and the last two layers stay (Shortened LLaMA's Magnitude+)."""
    return _least_first(task, "magnitude_plus", magnitude(task.model, task.adapter), _unprotected(task, "magnitude"))


def least_angular_distance(task: DepthTask) -> DepthStrategy:
    """Remove, for every depth, the run of neighbouring layers over which the states turn least; not nested.

    Gromov et al., arXiv:2403.17887, section 3.2; of equal runs the deepest.
    """
    layers, removable = task.num_layers, task.removable()
    distances = angular_distances(task.model, task.adapter, task.batches, task.progress)
    _require_scores("angular_distance", distances.diagonal(1).tolist())
    kept: dict[float, tuple[int, ...]] = {layers: tuple(range(layers))}
    for count in range(1, layers - task.min_depth + 1):
        # l*(n) = argmin_l d(x_l, x_{l+n})
        first = min(range(removable - count, -1, -1), key=distances.diagonal(count).__getitem__)
        kept[layers - count] = (*range(first), *range(first + count, layers))
    return DepthStrategy(kept, selector="angular_distance")


def last_layers(task: DepthTask) -> DepthStrategy:
    """Remove the deepest layers but the last ``keep_last`` (Gromov et al., arXiv:2403.17887, section 4.4); nested."""
    return _removed_in_order(task, "last_layers", range(task.removable() - 1, -1, -1))


def random_depths(num_layers: int, depths: Sequence[int], seed: int) -> DepthStrategy:
    """Keep layers drawn at random, anew for every depth; the same seed draws the same. What chance would give."""
    kept = {depth: random.Random(f"{seed}.{depth}").sample(range(num_layers), depth) for depth in depths}
    return DepthStrategy(
        {depth: tuple(sorted(layers)) for depth, layers in {num_layers: range(num_layers), **kept}.items()},
        selector="random",
    )


def _unprotected(task: DepthTask, plain: str) -> range:
    last = max(PROTECTED_LAST, task.keep_last)
    removable = range(PROTECTED_FIRST, min(task.removable(), task.num_layers - last))
    wanted = task.num_layers - task.min_depth
    if len(removable) < wanted:
        raise RecipeError(
            f"selector {plain}_plus keeps the first {PROTECTED_FIRST} and the last {last} of the "
            f"{task.num_layers} layers, so that {len(removable)} can go, and min_depth {task.min_depth} removes "
            f"{wanted}; take selector {plain}, or a min_depth of {task.num_layers - len(removable)} or more"
        )
    return removable


def _least_first(task: DepthTask, name: str, scores: Sequence[Any], removable: range) -> DepthStrategy:
    """Return the strategy that removes the layers with the least scores first; equal ones from the first layer on."""
    _require_scores(name, scores)
    return _removed_in_order(task, name, sorted(removable, key=scores.__getitem__))


def _require_scores(name: str, scores: Sequence[Any]) -> None:
    for layer, score in enumerate(scores):
        if not all(map(math.isfinite, score if isinstance(score, tuple) else (score,))):
            raise DataError(
                f"selector {name}: the score of layer {layer} is {score}; check the weights, their dtype (float16 "
                "overflows), and the calibration data"
            )
    if len(scores) > 1 and len(set(scores)) == 1:
        raise DataError(
            f"selector {name} gives {scores[0]} to all {len(scores)} layers: it cannot tell them apart; give more or "
            "other calibration data, or take another selector"
        )


def _removed_in_order(task: DepthTask, name: str, order: Sequence[int]) -> DepthStrategy:
    """Return the strategy that removes layers in this order, one more for every depth."""
    layers = task.num_layers
    kept: dict[float, tuple[int, ...]] = {
        depth: tuple(index for index in range(layers) if index not in set(order[: layers - depth]))
        for depth in range(layers, task.min_depth - 1, -1)
    }
    return DepthStrategy(kept, selector=name)
