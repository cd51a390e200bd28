"""How much memory a run of a recipe will take at most, before any weight is loaded: what it is known to hold at a time.

An estimate of what the process has resident where everything is computed on the CPU. What layers compute with for a
moment is not in it, but for training, which keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from amoeba_plugin.modifiers import AdaptiveLayerTuningModifier, OneForAllDistillationModifier
from amoeba_plugin.modifiers.selection import NO_REPAIR
from amoeba_plugin.modifiers.width import MOMENTS_GIB
from amoeba_plugin.recipes.estimate import SEARCHES
from amoeba_plugin.recipes.weights import Weights
from amoeba_plugin.runtime.free_space import in_bytes
from amoeba_plugin.runtime.units import BYTES, quantity
from amoeba_plugin.selection.layer_runs import GIB
from amoeba_plugin.selection.repair.fold_table import LEAST_JUDGING
from amoeba_plugin.selection.repair.moments import held_out_count
from amoeba_plugin.selection.width.splits import MOST_SPLITS
from amoeba_plugin.training.layer_tuning.windows import Window, windows_below
from amoeba_plugin.training.next_token import chunk_rows

# Bytes of torch's build for CPUs, transformers, llm-compressor and data sets once a run has begun; of what a training
# imports beside: measured on Linux with a model of 8 MB.
LIBRARIES, TRAINER = 750_000_000, 200_000_000
MATRICES = 6  # of second moments of one layer, fp64, that a repair has at a time
SERIALIZED = 3  # times repaired weights are there while safetensors writes them
OPTIMIZED = 4  # times a trained weight is there: itself, its gradient, two moments of AdamW
RUNS_A_DEPTH = 3  # runs of removed layers that a search folds anew for every layer that goes


@dataclass(frozen=True)
class MemoryNeed:
    """The most memory that a run takes, in bytes.

    Attributes:
        libraries: Of the process before anything is loaded.
        model: Of its weights.
        stages: What each stage holds beside.
    """

    libraries: int
    model: int
    stages: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return self.libraries + self.model + max(self.stages.values(), default=0)

    @property
    def in_words(self) -> str:
        """A sentence."""
        told = f"memory: about {in_bytes(self.peak)} at most, where all is computed on the CPU"
        if not self.stages:
            return told
        stage = max(self.stages, key=lambda each: self.stages[each])
        return f"{told}: the model {in_bytes(self.model)}, beside it in {stage} {in_bytes(self.stages[stage])}"


def memory_need(weights: Weights, samples: int, length: int, itemsize: int, subnet: int) -> MemoryNeed:
    """Return what a recipe holds at a time.

    Args:
        weights: Of the recipe and its model.
        samples: Sequences of calibration data.
        length: Tokens of each.
        itemsize: Bytes of a number of the dtype that the run computes in.
        subnet: Weights of the largest subnet that may be cut.
    """
    plan, hidden = weights.plan, weights.config.hidden_size
    repaired, whole = itemsize * weights.repaired, itemsize * weights.whole
    state = itemsize * samples * length * hidden
    matrices = MATRICES * 8 * weights.neurons**2
    stages: dict[str, int] = {}
    if plan.depth is not None:
        held = search_states(weights, samples, length, itemsize)
        stages["the depth search"] = sum(min(size, limit) for size, limit in held.values())
    if plan.width is not None:
        measured = plan.width.allocation == "measured"
        trials = MOST_SPLITS * state // samples * plan.width.judging(samples) if measured else 0
        moments = 8 * weights.moments if plan.width.repair != NO_REPAIR else 0
        stages["the width ranking"] = min(moments, round(MOMENTS_GIB * GIB)) + matrices + 2 * state + trials
    if repaired:
        kept = plan.width is not None and plan.width.resume_dir is not None
        stages["the repair"] = (SERIALIZED if kept else 1) * repaired + matrices + 2 * state
    if plan.training is not None and plan.training.max_steps:
        stages["the training"] = TRAINER + repaired + _training(weights, plan.training, length, itemsize)
    if plan.training is not None and plan.training.elastic_dir is not None:
        stages["writing the elastic checkpoint"] = SERIALIZED * repaired
    if plan.extraction is not None:
        stages["the extraction"] = repaired + 2 * itemsize * subnet
    if plan.tuning is not None:
        tuning, room = TRAINER + _tuning(weights, plan.tuning, samples, length, itemsize), math.inf
        if plan.tuning.memory is not None:  # what it may take is planned
            room = max(0, round(quantity(plan.tuning.memory, BYTES)) - LIBRARIES - whole)
        stages["the layer tuning"] = round(min(tuning, room))
    return MemoryNeed(LIBRARIES, whole, stages)


def search_states(weights: Weights, samples: int, length: int, itemsize: int) -> dict[str, tuple[int, int]]:
    """Return the bytes that a depth search has to hold, and of them the most that it holds in memory; by what it is."""
    depth, layers, hidden = weights.plan.depth, weights.config.num_hidden_layers, weights.config.hidden_size
    if depth is None or depth.kept_layers is not None or depth.selector not in SEARCHES:
        return {}
    limit = round(depth.cache_gib * GIB)
    judged, fitted = samples, 0
    if depth.repair != NO_REPAIR and depth.granularity == "layer" and depth.questions is None:
        judged = held_out_count(samples, LEAST_JUDGING)
        fitted = samples - judged
    token, gone = itemsize * length, layers - depth.least_depth(layers)
    folds = min(layers + RUNS_A_DEPTH * gone, layers * gone)
    return {
        "states of rows that judge": (judged * token * hidden * (layers + 1), limit // 2),
        "states of subnets": (judged * token * hidden * layers, limit // 2),
        "states of rows that fit": (fitted * token * hidden * (layers + 1), limit // 2),
        "neurons": (fitted * token * weights.neurons, limit // 2),
        "folds": (4 * hidden * weights.neurons * folds if fitted else 0, limit),
    }


def _training(weights: Weights, modifier: OneForAllDistillationModifier, length: int, itemsize: int) -> int:
    """Return the bytes of what is trained, and of what one subnet's layers keep for its backward pass."""
    config = weights.config
    trained = weights.whole if modifier.adapter == "none" else weights.of_adapter(modifier.adapter)
    tokens = modifier.batch_size * (length if modifier.dataset is None else modifier.max_seq_length)
    layers = 1 if modifier.gradient_checkpointing else config.num_hidden_layers
    channels = sum(group.channels for group in weights.groups if group.consumer.expert is None)
    kept = 10 * config.hidden_size + 4 * channels
    logits = 2 * 4 * tokens * config.vocab_size  # of the teacher, and of the subnet or a part of its own
    activations: int = itemsize * tokens * layers * kept + logits
    return 4 * OPTIMIZED * trained + activations


def _tuning(
    weights: Weights, modifier: AdaptiveLayerTuningModifier, samples: int, length: int, itemsize: int
) -> int:  # fmt: skip
    """Return the bytes of what is trained, of what windows keep for their backward pass, and of kept states."""
    config, windows = weights.config, _windows(weights, modifier)
    widest = max(each.depth - each.first for each in windows)
    positions = length if modifier.dataset is None else modifier.max_seq_length
    if modifier.adapter == "none":
        layer = (weights.whole - weights.outside) // config.num_hidden_layers
        moments = config.num_hidden_layers if modifier.keep_states else widest
        trained = 4 * layer * (widest + 2 * moments)
    else:
        trained = 4 * OPTIMIZED * weights.of_adapter(modifier.adapter)
    channels = sum(group.channels for group in weights.groups if group.consumer.expert is None)
    tokens, layers = modifier.batch_size * positions, 1 if modifier.gradient_checkpointing else widest
    logits = 2 * 4 * min(tokens, chunk_rows(config.vocab_size, torch.device("cpu"))) * config.vocab_size
    activations = itemsize * tokens * (layers * (10 * config.hidden_size + 4 * channels) + widest * config.hidden_size)
    states = kept_states(weights, modifier, samples, length, itemsize) if modifier.checkpoint_dir is None else 0
    total: int = round(trained + activations + logits + states)
    return total


def kept_states(
    weights: Weights, modifier: AdaptiveLayerTuningModifier, samples: int, length: int, itemsize: int
) -> int:  # fmt: skip
    """Return the bytes of what comes out of the layers below windows, as far as it is kept."""
    sequences, positions = samples, length
    if modifier.dataset is not None:
        sequences, positions = modifier.num_samples, modifier.max_seq_length
    below = sum(each.first > 0 for each in _windows(weights, modifier))
    every = itemsize * sequences * positions * weights.config.hidden_size * below
    kept: int = round(min(modifier.cache_gib * GIB, every))
    return kept


def _windows(weights: Weights, modifier: AdaptiveLayerTuningModifier) -> tuple[Window, ...]:
    exits = modifier.exits.of(weights.config.num_hidden_layers)
    return windows_below(exits, modifier.window, apart=not modifier.is_stacked)
