"""What decoder layers are worth, each on its own: the figures that published depth selectors rank by.

Sums run over the batches of all ranks, so that a calibration set cut into batches or shards gives the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.errors import DataError
from amoeba_plugin.models.adapter import ArchitectureAdapter, copy_config
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.module_calls import evaluating, onloaded
from amoeba_plugin.runtime.ranks import sum_over_ranks
from amoeba_plugin.selection.depth.runner import runner_for
from amoeba_plugin.selection.depth.steps import Removed
from amoeba_plugin.selection.depth.task import DepthTask
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.hidden_states import layer_flow
from amoeba_plugin.selection.objectives import Objective, Score, sort_key
from amoeba_plugin.selection.over_ranks import share_of


def block_influence(
    model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch], progress: bool = True
) -> list[float]:
    """Return for each layer 1 - mean cosine over tokens of input and output (ShortGPT, arXiv:2403.03853, eq. 1)."""
    similarity = torch.zeros(len(adapter.layers(model)) + 1, dtype=torch.float64)  # last: tokens
    with evaluating(model):
        for batch in tqdm(batches, desc="block influence", unit="batch", disable=not progress):
            present = batch["attention_mask"].bool()
            similarity[-1] += int(present.sum())
            for index, (states, output) in enumerate(layer_flow(model, adapter, batch)):
                # BI_i = 1 - E_t[ x_t . y_t / (|x_t| |y_t|) ], in fp32
                cosine = functional.cosine_similarity(states.float(), output.float(), dim=-1)
                similarity[index] += cosine[present.to(cosine.device)].double().sum().item()
    *sums, tokens = sum_over_ranks(similarity).tolist()
    if not tokens:
        raise DataError(
            "no token to measure block influence on: the calibration data is empty or all padding; pass texts"
        )
    return [1 - total / tokens for total in sums]


def angular_distances(
    model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch], progress: bool = True
) -> Tensor:
    """Return how far the states turn between layers (Gromov et al., arXiv:2403.17887, eq. 3).

    Returns:
        (layers + 1, layers + 1) fp64: between what enters layer l and what enters layer m (behind the last layer: what
        leaves it), at the last token of each sequence, mean over sequences; 0 is the same direction, 1 the opposite.
    """
    size = len(adapter.layers(model)) + 1
    total, sequences = torch.zeros(size, size, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for batch in tqdm(batches, desc="angular distance", unit="batch", disable=not progress):
            rows, last = last_tokens(batch["attention_mask"].cpu())  # states may be on several devices
            flow = layer_flow(model, adapter, batch)
            states = [states[rows, last].double().cpu() for states in (*(enters for enters, _ in flow), flow[-1][1])]
            directions = functional.normalize(torch.stack(states, dim=1), dim=-1)  # (rows, layers + 1, hidden)
            # d(l, m) = 1/pi arccos( x_l . x_m / (|x_l| |x_m|) )
            cosine = (directions @ directions.mT).clamp(-1, 1)
            total += (cosine.arccos() / math.pi).sum(dim=0)
            sequences += len(rows)
    count = sum_over_ranks(sequences).item()
    if not count:
        raise DataError("no token to measure angles on: the calibration data is empty or all padding; pass texts")
    return sum_over_ranks(total) / count


def last_tokens(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that have a token, and the position of the last one in each, whichever side is padded.

    >>> last_tokens(torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]))
    (tensor([0, 2]), tensor([1, 2]))
    """
    rows = mask.bool().any(dim=1).nonzero()[:, 0]
    positions = torch.arange(mask.shape[1], device=mask.device)
    return rows, (mask.bool()[rows] * positions).amax(dim=1)


def scores_without(
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    objective: Objective,
    batches: Sequence[Batch],
    progress: bool = True,
) -> list[Score]:
    """Return for each layer the objective of the model without it (Shortened LLaMA's PPL, arXiv:2402.02834).

    The layers before the missing one are run once for all, which may round differently (by about 1e-6, relative) than
    a run from the embeddings. Ranks that were given the same batches share them out.
    """
    objective.check(batches)
    mine, _ = share_of(objective, batches)
    task = DepthTask(model, adapter, objective, batches, min_depth=1)
    alone = [Removed({layer}) for layer in range(task.num_layers)]
    with (
        tqdm(total=len(alone) * len(mine), desc="layers left out", unit="batch", disable=not progress) as bar,
        runner_for(task, mine, len(alone)) as runner,
        evaluating(model),
    ):
        return list(runner.measure(objective, alone, bar.update))


def most_sensitive_layers(
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    objective: Objective,
    batches: Sequence[Batch],
    count: int,
    progress: bool = True,
) -> list[int]:
    """Return the layers without which the objective is worst, each left out alone (ELMS, arXiv:2409.09071).

    Returns:
        ``count`` indices, ascending; a layer without which the objective is NaN comes first of all.
    """
    scores = scores_without(model, adapter, objective, batches, progress)
    worst_first = sorted(range(len(scores)), key=lambda index: sort_key(objective, scores[index]), reverse=True)
    return sorted(worst_first[:count])


def taylor(
    model: PreTrainedModel, adapter: ArchitectureAdapter, batches: Sequence[Batch], progress: bool = True
) -> list[float]:
    """Return for each layer the sum of |gradient x weight| over the elements of its matrices.

    First-order Taylor importance of Shortened LLaMA, arXiv:2402.02834, section 2.1. Memory: see ``loss_gradients``.
    """
    weights = [_matrices(layer) for layer in adapter.layers(model)]
    names = {f"{index}.{name}": weight for index, layer in enumerate(weights) for name, weight in layer.items()}
    gradients = loss_gradients(model, names, batches, progress)
    # I_n = sum over k, i, j of |dL/dW_ij^{k,n} * W_ij^{k,n}|
    return [
        sum(
            (gradients[f"{index}.{name}"] * weight.detach().to("cpu", torch.float32)).abs().double().sum().item()
            for name, weight in layer.items()
        )
        for index, layer in enumerate(weights)
    ]


def magnitude(model: PreTrainedModel, adapter: ArchitectureAdapter) -> list[float]:
    """Return for each layer the sum of |weight| over the elements of its matrices (Shortened LLaMA, section 2.1)."""
    sums = []
    for layer in adapter.layers(model):
        with onloaded(layer.modules()):
            sums.append(sum(each.detach().abs().sum(dtype=torch.float64).item() for each in _matrices(layer).values()))
    return sums


def _matrices(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return a layer's weights by name, without norms and biases."""
    return {name: weight for name, weight in layer.named_parameters() if weight.dim() > 1}


@contextmanager
def keeping(
    model: PreTrainedModel, adapter: ArchitectureAdapter, kept: Sequence[int], lost: Mapping[int, str] | None = None
) -> Iterator[None]:
    """Run a block with some of the layers, some of which have lost a sublayer; all are back afterwards, after an
    exception too."""
    layers, config = tuple(adapter.layers(model)), copy_config(model.config)
    stand_ins = StandIns(adapter.sublayers(config) if lost else {}, layers)
    try:
        with stand_ins.without(lost or {}):
            adapter.set_layers(model, [layers[index] for index in kept], kept, config)
            yield
    finally:
        adapter.set_layers(model, layers, range(len(layers)), config)
