"""What a recipe writes, and what it needs of disks for a while, in bytes, before any weight is loaded: an upper bound.

It knows the sizes of tensors and how many there are at a time, not how a file system stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from transformers import PretrainedConfig

from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.profiling.measure import Measuring
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.modifiers import AdaptiveLayerTuningModifier, OneForAllDistillationModifier
from amoeba_plugin.modifiers.trained import TrainedModifier
from amoeba_plugin.recipes.memory import kept_states, search_states
from amoeba_plugin.recipes.weights import Weights
from amoeba_plugin.runtime.dtypes import computing_dtype, dtype_of, saved_dtype
from amoeba_plugin.runtime.free_space import in_bytes

TEXTS = 200_000  # bytes of configuration, cards and the like in a directory
TOKEN = 100  # bytes of a tokenizer's files for each of its tokens, at most
CHECKPOINTS = 3  # of a training that are there while the last of them is written; two stay
KEPT = "the selection's steps"  # what is written of it for a killed run to go on from
OPTIMIZED = 3  # numbers in a checkpoint for every one that is trained: itself, and AdamW's two


@dataclass(frozen=True)
class NumberSizes:
    """Bytes of a weight.

    Attributes:
        computed: Of the dtype that a run computes in.
        stored: Of the one that its checkpoint is saved in.
    """

    computed: int
    stored: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> NumberSizes:
        """Return those of a run of a model on this machine, whose dtype is auto."""
        stored = dtype_of(config)
        name, _ = computing_dtype(stored)
        computed = torch.float32 if name == "auto" else getattr(torch, name)
        return cls(computed.itemsize, saved_dtype(computed, stored).itemsize)


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        written: Bytes that it leaves where its results go, by what they are.
        meanwhile: Bytes there that are gone when it ends.
        temporary: Bytes in the system's temporary directory at most; gone when it ends.
    """

    written: Mapping[str, int] = field(default_factory=dict)
    meanwhile: int = 0
    temporary: int = 0


@dataclass(frozen=True)
class DiskNeed:
    """What a run needs of disks.

    Attributes:
        phases: In their order.
    """

    phases: Sequence[Phase]

    @property
    def written(self) -> dict[str, int]:
        """Bytes that stay, by what they are."""
        return {name: count for phase in self.phases for name, count in phase.written.items()}

    @property
    def output(self) -> int:
        """The most bytes at a time where results go."""
        return max(self._at_a_time(with_temporary=False), default=0)

    @property
    def temporary(self) -> int:
        """The most bytes at a time in the temporary directory."""
        return max((phase.temporary for phase in self.phases), default=0)

    @property
    def together(self) -> int:
        """The most bytes at a time in both."""
        return max(self._at_a_time(with_temporary=True), default=0)

    @property
    def in_words(self) -> str:
        """A sentence."""
        parts = ", ".join(f"{name} {in_bytes(count)}" for name, count in self.written.items() if count)
        return (
            f"disk: at most {in_bytes(sum(self.written.values()))} stay ({parts}); on the way {in_bytes(self.output)} "
            f"there and {in_bytes(self.temporary)} in the temporary directory, {in_bytes(self.together)} at a time"
        )

    def _at_a_time(self, with_temporary: bool) -> Iterator[int]:
        stays = accumulate(sum(phase.written.values()) for phase in self.phases)
        for phase, total in zip(self.phases, stays, strict=True):
            yield total + phase.meanwhile + (phase.temporary if with_temporary else 0)


def recipe_disk(
    weights: Weights, samples: int, length: int, sizes: NumberSizes, subnet: int, subject: Subject | None = None
) -> DiskNeed:
    """Return what a run of a recipe needs.

    Args:
        weights: Of the recipe and its model.
        samples: Sequences of calibration data.
        length: Tokens of each.
        sizes: Of numbers.
        subnet: Weights of the largest subnet that may be cut.
        subject: What is profiled for the recipe's budget; ``None``: nothing is.
    """
    extraction, training = weights.plan.extraction, weights.plan.training
    budget = None if extraction is None else extraction.limits
    points = () if budget is None else budget.points
    states = search_states(weights, samples, length, sizes.computed).values()
    phases = [] if subject is None else [_profile(weights, subject, points)]
    phases.append(Phase(temporary=sum(max(0, size - limit) for size, limit in states)))
    if weights.plan.width is not None and weights.plan.width.resume_dir is not None:
        phases.append(Phase({KEPT: _strategy(weights, sizes) + TEXTS}))
    if training is not None:
        phases += _training(weights, training, sizes)
    if extraction is not None:
        # a shape is measured beside one that was measured before, and of a lossy scheme judged in its engine
        measured = [
            2 * size + made + 4 * subnet + around(weights)
            for size, made in (exported(weights, point, subnet) for point in points)
        ]
        phases.append(Phase(
            {"the subnet": subnet * sizes.stored + around(weights)},
            meanwhile=subnet * sizes.computed if sizes.computed != sizes.stored else 0,
            temporary=max(measured, default=0),
        ))  # fmt: skip
    if weights.plan.tuning is not None:
        phases += _tuning(weights, weights.plan.tuning, samples, length, sizes)
    return DiskNeed(phases)


def exact(point: Point) -> bool:
    """Tell whether nothing is lost at a point, so that no export of the whole model is compared with."""
    flow, _ = point_named(str(point))
    return point.scheme in flow.exact


def exported(weights: Weights, point: Point, count: int) -> tuple[int, int]:
    """Return the bytes that so many weights take as a flow exports them, and what its converter needs meanwhile.

    Where a scheme is made of another file, that is taken to be of single precision.
    """
    flow, _ = point_named(str(point))
    outside = min(count, weights.outside)
    made = 0 if exact(point) else 4 * count
    return flow.bytes_of(point.scheme, count - outside, outside) + around(weights), made


def _profile(weights: Weights, subject: Subject, points: Sequence[Point]) -> Phase:
    """Of every flow, all shapes that are measured come to be there together, each made of a checkpoint of fp32."""
    counts = weights.of_shapes(Measuring().chosen(subject)).values()
    needed = 0
    for point in points:
        files = 0
        for count in counts:
            size, made = exported(weights, point, count)
            files += size
            needed = max(needed, files + made + 4 * count + around(weights))
    return Phase({"the profile": TEXTS}, temporary=needed)


def _strategy(weights: Weights, sizes: NumberSizes) -> int:
    return weights.repaired * sizes.computed + weights.order_bytes + TEXTS


def around(weights: Weights) -> int:
    """Return the bytes of what is beside the weights of a checkpoint."""
    vocabulary: int = weights.config.vocab_size
    return TOKEN * vocabulary + TEXTS


def _checkpoints(name: str, training: TrainedModifier, trained: int) -> Phase:
    each, saves = 4 * OPTIMIZED * trained + 2 * TEXTS, -(-training.max_steps // training.save_steps)
    stay = min(saves, CHECKPOINTS - 1) * each  # AdamW keeps a step for every tensor
    return Phase({name: stay}, meanwhile=min(saves, CHECKPOINTS) * each - stay)


def _tuning(
    weights: Weights, tuning: AdaptiveLayerTuningModifier, samples: int, length: int, sizes: NumberSizes
) -> Iterator[Phase]:
    """Kept states and checkpoints, which stay where a killed run shall go on, and what was tuned."""
    full, trained = tuning.adapter == "none", weights.whole
    if tuning.adapter != "none":
        trained = weights.of_adapter(tuning.adapter)
    if tuning.checkpoint_dir is not None:
        yield _checkpoints("the layer tuning's checkpoints", tuning, trained)
        yield Phase({"states below its windows": kept_states(weights, tuning, samples, length, sizes.computed)})
    if tuning.tuned_dir is not None:
        base = 0 if weights.plan.tuned_behind else weights.whole * sizes.stored + around(weights)
        adapter = 0 if full else 4 * trained + TEXTS
        yield Phase({"the tuned model": weights.whole * sizes.stored + around(weights) if full else base + adapter})


def _training(weights: Weights, training: OneForAllDistillationModifier, sizes: NumberSizes) -> Iterator[Phase]:
    trained = 0
    if training.max_steps:
        trained = weights.whole if training.adapter == "none" else weights.of_adapter(training.adapter)
    if trained and training.checkpoint_dir is not None:
        yield _checkpoints("the training's checkpoints", training, trained)
    if training.elastic_dir is None:
        return
    elastic = {"the strategy with repaired weights": _strategy(weights, sizes)}
    if trained and training.adapter == "none":
        elastic["the trained base"] = trained * sizes.stored + around(weights)
    elif trained:
        elastic["the adapter"] = 4 * trained + TEXTS
    yield Phase(elastic)
