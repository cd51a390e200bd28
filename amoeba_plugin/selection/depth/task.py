"""What a depth selector is asked, and what one is: the contract between recipes and the ways to choose layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.selection.depth.steps import Granularity, RunFolds
from amoeba_plugin.selection.objectives import Objective


@dataclass(frozen=True)
class SearchOptions:
    """What the dynamic program can be told beside what every selector is.

    Attributes:
        beam: Removal sets that each state of the program keeps. 1 is the paper: as losses of layers do not add up, the
            best set may have a part that is not the best of its own, and a wider beam finds it.
        exchanges: Rounds after the program, in each of which every depth tries to exchange one removed layer for one
            kept. 0 is the paper.
        granularity: "layer" (the paper), or "sublayer": attention and MLP of a layer go apart, each half a layer of
            depth. There are then twice as many depths, and about four times as many subnets.
        cache_gib: GiB of hidden states held in memory; on an accelerator as much again on the CPU. The rest is files.
        resume_dir: Where to keep every score, after every step; what is there already is not measured again.
    """

    beam: int = 1
    exchanges: int = 0
    granularity: Granularity = "layer"
    cache_gib: float = 4.0
    resume_dir: Path | str | None = None


@dataclass(frozen=True)
class DepthTask:
    """What a selector is asked: which model to shorten, how far, and by what to judge.

    Attributes:
        model: A causal LM with all its layers; to be left as it was, after an exception too.
        adapter: Its architecture.
        objective: What to make best, for selectors that measure it; equal values are decided by its loss.
        batches: Calibration data, from ``materialise``; the same ones for every candidate.
        min_depth: Layers of the shallowest subnet.
        keep_last: Last layers that are never removed.
        progress: Show progress bars while layers are measured.
        options: Of the dynamic program. Others may look at those they name in ``DepthSelector.options``.
        folds: What stands in for removed layers in every candidate that a search measures; ``None``: nothing. Their
            maps are of other data than ``batches``, or they would look better than they are.
    """

    model: PreTrainedModel
    adapter: ArchitectureAdapter
    objective: Objective
    batches: Sequence[Batch]
    min_depth: int
    keep_last: int = 1
    progress: bool = True
    options: SearchOptions = SearchOptions()
    folds: RunFolds | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model, the deepest depth."""
        return len(self.adapter.layers(self.model))

    def removable(self) -> int:
        """Return how many layers, from the first on, may go.

        Raises:
            RecipeError: If no layer, or too many, would be removed.
        """
        layers = self.num_layers
        if not 1 <= self.min_depth < layers:
            raise RecipeError(
                f"min_depth {self.min_depth} is impossible: the model has {layers} layers; take 1..{layers - 1}, "
                "or leave DepthShrinkingModifier out to keep all layers"
            )
        if not 0 <= self.keep_last <= self.min_depth:
            raise RecipeError(
                f"keep_last {self.keep_last} is impossible with min_depth {self.min_depth}: layers never removed are "
                f"among those kept; take 0..{self.min_depth}"
            )
        return layers - self.keep_last


@dataclass(frozen=True)
class DepthSelector:
    """A way to choose, for every depth, the layers to keep.

    Attributes:
        name: The name it is registered under.
        select: Returns a strategy for every depth from the whole model's down to ``DepthTask.min_depth``.
        options: Fields of :class:`SearchOptions` that it looks at; a recipe that sets another one is refused.
        folds: Whether it measures candidates with ``DepthTask.folds``.
        description: One line for people.
    """

    name: str
    select: Callable[[DepthTask], DepthStrategy]
    options: tuple[str, ...] = ()
    description: str = ""
    folds: bool = False
