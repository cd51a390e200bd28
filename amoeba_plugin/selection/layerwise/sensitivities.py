"""What every unit loses by every option: at its layer's output, at the model's, or by gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor

from amoeba_plugin.data.batch import target_counts
from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.runtime.progress import StageBar
from amoeba_plugin.runtime.ranks import sum_over_ranks
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.layerwise.compress import exchanged
from amoeba_plugin.selection.layerwise.options import Option
from amoeba_plugin.selection.layerwise.task import Scores, SensitivityTask, divergence

Sums = dict[tuple[str, Option], float]


def output_error(task: SensitivityTask) -> Scores:
    """Return the squared error of a layer's output on its own dense input, relative to what the layer adds.

    ``|f'(x) - f(x)|^2 / |f(x) - x|^2`` over all tokens, where ``f'`` is the layer ``f`` with one unit compressed.
    """
    errors: Sums = {(unit.name, option): 0.0 for unit in task.units for option in task.options}
    added = torch.zeros(len(task.dense.lockstep.layers), dtype=torch.float64)
    for layer, units in task.by_layer("output errors"):
        for batch in range(len(task.dense.batches)):
            present = task.dense.present(batch)
            x, y = (task.dense.before(each, batch)[present] for each in (layer, layer + 1))
            added[layer] += float((y.float() - x.float()).square().sum())
        for unit in units:
            for option in task.options:
                with exchanged(task.compressor.weights(unit, option)):
                    for batch in range(len(task.dense.batches)):
                        present = task.dense.present(batch)
                        out = task.dense.through(layer, layer, batch)[present]
                        y = task.dense.before(layer + 1, batch)[present]
                        errors[unit.name, option] += float((out.float() - y.float()).square().sum())
    added, found = sum_over_ranks(added), _over_ranks(errors)
    layers = {unit.name: unit.layer for unit in task.units}
    return {key: error / max(float(added[layers[key[0]]]), 1e-30) for key, error in found.items()}


def final_divergence(task: SensitivityTask) -> Scores:
    """Return the KL divergence of the model with one unit compressed from the dense one, in nats per token.

    The layers below are run once for all: each candidate starts at its own layer, from the dense states before it.
    """
    sums: Sums = {(unit.name, option): 0.0 for unit in task.units for option in task.options}
    last = len(task.dense.lockstep.layers) - 1
    for layer, units in task.by_layer("divergences"):
        made = {(unit.name, option): task.compressor.weights(unit, option) for unit in units for option in task.options}
        for batch in range(len(task.dense.batches)):
            dense = task.dense.dense_log_probabilities(batch)
            probabilities = dense.exp()
            for key, weights in made.items():
                with exchanged(weights):
                    states = task.dense.through(layer, last, batch)
                sums[key] += divergence(dense, probabilities, task.dense.log_probabilities(states, batch))
    tokens = task.token_count()
    return {key: max(nats, 0.0) / tokens for key, nats in _over_ranks(sums).items()}


def fisher(task: SensitivityTask) -> Scores:
    """Return half the change of weights squared, weighted by squared gradients: a diagonal Fisher, in nats per token.

    One backward pass; the cheapest, and blind to what weights of a unit do together.
    """
    model = task.compressor.model
    linears = {
        linear: f"{unit.name} {place}" for unit in task.units for place, linear in enumerate(unit.linears(model))
    }
    weights = {name: linear.get_parameter("weight") for linear, name in linears.items()}
    squared = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    tokens = 0
    for batch in StageBar(task.batches, desc="gradients", unit="batch", disable=not task.progress, shorter=LESS_DATA):
        count = int(target_counts(batch).sum())
        if not count:
            continue
        tokens += count
        for name, mean in loss_gradients(model, weights, [batch], progress=False).items():
            squared[name] += (mean * count).square()
    return {
        (unit.name, option): sum(
            _weighted(squared[linears[linear]], linear.weight.detach(), weight)
            for linear, weight in task.compressor.weights(unit, option)
        )
        / (2 * tokens)
        for unit in task.units
        for option in task.options
    }


def _weighted(squared: Tensor, weight: Tensor, changed: Tensor) -> float:
    return float((squared * (changed - weight).cpu().float().square()).sum())


def _over_ranks(sums: Sums) -> Sums:
    total = sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64))
    return dict(zip(sums, total.tolist(), strict=True))
