"""Scores of models on the batches of all ranks together, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.sharing import shard
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.runtime.ranks import gather
from amoeba_plugin.selection.objectives import Objective, Score


def share_of(objective: Objective, batches: Sequence[Batch]) -> tuple[Sequence[Batch], str]:
    """Return the batches that this rank scores a model on, and a digest of the data of all ranks.

    An objective that measures a model as a whole needs all batches on every rank.
    """
    mine, data = shard(batches)
    return mine if objective.is_separable else batches, data


def score_over_ranks(objective: Objective, model: PreTrainedModel, batches: Sequence[Batch]) -> Score:
    """Score a model on the batches of all ranks together; every rank gets the same.

    Args:
        objective: One that overrides ``measure`` scores as a whole: all ranks then follow the first one.
        model: In any mode; it has its own back afterwards, and its weights are not changed.
        batches: This rank's; may be none.
    """
    if not objective.is_separable:
        return of_first_rank(objective.measure(model, batches))
    with evaluating(model):
        observed = [objective.observe(model, batch) for batch in batches]
    return scores_over_ranks(objective, [joined(observed)])[0]


def scores_over_ranks(objective: Objective, observed: Sequence[Tensor]) -> list[Score]:
    """Return the scores of several models, each on the observations of all ranks.

    Args:
        objective: One made of observations.
        observed: For each model what this rank observed, (rows, columns) fp64; (0, 0) where it has no batch.
    """
    rows = torch.stack(list(observed), dim=1)  # (rows, models, columns)
    columns = int(gather(torch.tensor([rows.shape[-1]])).max())  # unknown where a rank has no batch
    everywhere = gather(rows if len(rows) else rows.new_zeros(0, len(observed), columns))
    return [objective.score(everywhere[:, number]) for number in range(len(observed))]


def joined(observed: Sequence[Tensor]) -> Tensor:
    """Return the observations of all batches of a rank, (rows, columns) fp64; (0, 0) of no batch."""
    return torch.cat(list(observed)) if observed else torch.zeros(0, 0, dtype=torch.float64)


def of_first_rank(score: Score) -> Score:
    """Return the score that the first rank measured: scores of wholes cannot be put together."""
    value, loss = gather(torch.tensor([[score.value, score.loss]], dtype=torch.float64))[0].tolist()
    return Score(value, loss)
