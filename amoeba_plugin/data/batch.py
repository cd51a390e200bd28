"""What a batch is: a dict of tensors, which everything that measures or trains a model takes.

``input_ids``, ``attention_mask`` and ``labels`` are each (batch, positions) int64, ``labels`` being -100 where nothing
is predicted. Logits at position t predict the label at t + 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a token that is no target; the convention of torch and transformers
SEQUENCE_COLUMNS = ("input_ids", "attention_mask", "labels")
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Select from a batch what a model's ``forward`` takes, moved to its device; labels and bookkeeping stay behind."""
    return {name: batch[name].to(device) for name in MODEL_INPUTS if name in batch}


def target_counts(batch: Batch) -> Tensor:
    """Return how many tokens of each row are predicted: (batch,), int64."""
    return (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
