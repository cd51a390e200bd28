"""Ways to choose the layers of every depth: the dynamic program, and the published ones it is compared with.

All but the program rank layers once. What they rank by is in :mod:`amoeba_plugin.layer_scores`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from amoeba_plugin.architecture import ArchitectureAdapter
from amoeba_plugin.calibration import Batch
from amoeba_plugin.depth import search_depths
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.hookspecs import hookimpl
from amoeba_plugin.layer_scores import block_influence
from amoeba_plugin.objectives import Objective
from amoeba_plugin.strategy import DepthStrategy


@dataclass(frozen=True)
class DepthTask:
    """What a selector is asked.

    Attributes:
        model: A causal LM with all its layers; to be left as it was.
        adapter: Its architecture.
        objective: What to make best, for selectors that measure it.
        batches: Calibration data.
        min_depth: Layers of the shallowest subnet.
        keep_last: Last layers that are never removed.
        progress: Show progress bars.
        options: Those fields of ``DepthShrinkingModifier`` that the selector names in ``DepthSelector.options``.
    """

    model: PreTrainedModel
    adapter: ArchitectureAdapter
    objective: Objective
    batches: Sequence[Batch]
    min_depth: int
    keep_last: int = 1
    progress: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.adapter.layers(self.model))


@dataclass(frozen=True)
class DepthSelector:
    """A way to choose, for every depth, the layers to keep.

    Attributes:
        name: The name it is registered under.
        select: Returns a strategy for every depth from the whole model's down to ``DepthTask.min_depth``.
        options: Fields of ``DepthShrinkingModifier`` that it takes beside the common ones.
        description: One line for people.
    """

    name: str
    select: Callable[[DepthTask], DepthStrategy]
    options: tuple[str, ...] = ()
    description: str = ""


def dynamic_program(task: DepthTask) -> DepthStrategy:
    """Search (AmoebaLLM); see :func:`amoeba_plugin.depth.search_depths`."""
    return search_depths(
        task.model,
        task.adapter,
        task.objective,
        task.batches,
        min_depth=task.min_depth,
        keep_last=task.keep_last,
        progress=task.progress,
        **task.options,
    )


def least_block_influence(task: DepthTask) -> DepthStrategy:
    """Remove the layers of least block influence first (ShortGPT, arXiv:2403.03853); nested."""
    influence = block_influence(task.model, task.adapter, task.batches)
    return _removed_in_order(task, "block_influence", _ascending(influence[: _removable(task)]))


def last_layers(task: DepthTask) -> DepthStrategy:
    """Remove the deepest layers but the last ``keep_last`` (Gromov et al., arXiv:2403.17887, section 4.4); nested."""
    return _removed_in_order(task, "last_layers", range(_removable(task) - 1, -1, -1))


def random_depths(num_layers: int, depths: Sequence[int], seed: int) -> DepthStrategy:
    """Keep layers drawn at random, anew for every depth; the same seed draws the same. What chance would give."""
    kept = {depth: random.Random(f"{seed}.{depth}").sample(range(num_layers), depth) for depth in depths}
    return DepthStrategy(
        {depth: tuple(sorted(layers)) for depth, layers in {num_layers: range(num_layers), **kept}.items()}, "random"
    )


def _ascending(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=scores.__getitem__)


def _removable(task: DepthTask) -> int:
    """Return how many layers, from the first on, may go; refuse depths that cannot be."""
    layers = task.num_layers
    if not 1 <= task.min_depth < layers:
        raise RecipeError(
            f"min_depth {task.min_depth} is impossible: the model has {layers} layers; take 1..{layers - 1}, "
            "or leave DepthShrinkingModifier out to keep all layers"
        )
    if not 0 <= task.keep_last <= task.min_depth:
        raise RecipeError(
            f"keep_last {task.keep_last} is impossible with min_depth {task.min_depth}: layers never removed are among "
            f"those kept; take 0..{task.min_depth}"
        )
    return layers - task.keep_last


def _removed_in_order(task: DepthTask, name: str, order: Sequence[int]) -> DepthStrategy:
    """Return the strategy that removes layers in this order, one more for every depth."""
    layers = task.num_layers
    kept = {
        depth: tuple(index for index in range(layers) if index not in set(order[: layers - depth]))
        for depth in range(layers, task.min_depth - 1, -1)
    }
    return DepthStrategy(kept, name)


@hookimpl
def amoeba_depth_selectors() -> Mapping[str, DepthSelector]:
    """Return the dynamic program and the published selectors."""
    built_in = (
        DepthSelector(
            "dynamic_program", dynamic_program, options=("beam", "exchanges"), description="the paper's search"
        ),
        DepthSelector(
            "block_influence", least_block_influence, description="1 - cosine of input and output (ShortGPT)"
        ),
        DepthSelector("last_layers", last_layers, description="the deepest layers but the last go"),
    )
    return {selector.name: selector for selector in built_in}
