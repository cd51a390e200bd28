"""A model's forward that ends in a loss: where the head is a plain one, its logits never exist at once."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from amoeba_plugin.training.chunked_head import chunked_head, has_plain_head
from amoeba_plugin.training.next_token import Positions, RowLoss, sum_over_rows


class HeadLoss:
    """Takes a loss of the logits at some positions, by the cheapest way that a model allows.

    Args:
        inner: The transformers model that has the head.
        may_chunk: False where somebody needs the logits as a whole.

    Attributes:
        chunked: Take the loss where the head stands, so that logits never exist at once.
        keeps_logits: Else let the model compute logits only where a sequence has a loss.
    """

    def __init__(self, inner: PreTrainedModel, may_chunk: bool = True) -> None:
        self._inner = inner
        self.chunked = may_chunk and has_plain_head(inner)
        parameters = signature(inner.forward).parameters
        # positions are where the tokens are, and a model on several devices has its last hidden states elsewhere
        devices = set(getattr(inner, "hf_device_map", {}).values())
        self.keeps_logits = "logits_to_keep" in parameters and len(devices) < 2
        # A cache would hold all keys and values, and makes transformers see a packed row as one document.
        self._without_cache = {"use_cache": False} if "use_cache" in parameters else {}

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], positions: Positions, row_loss: RowLoss) -> Tensor:
        """Return the sum of the rows' losses, () fp32, which can be differentiated once.

        Args:
            model: What is called: the model itself, or what wraps it.
            inputs: Of its forward, without labels.
            positions: Where it has losses.
            row_loss: Maps fp32 logits (n, vocabulary) and the slice of the rows they stand for to (n,) losses.
        """
        inputs = self._without_cache | dict(inputs)
        if self.chunked:
            with chunked_head(self._inner, positions.rows, row_loss):
                loss: Tensor = model(**inputs, logits_to_keep=positions.columns).logits
            return loss
        if self.keeps_logits:
            logits: Tensor = model(**inputs, logits_to_keep=positions.columns).logits.flatten(0, 1)
        else:
            logits = logits_at(model(**inputs).logits, positions)
        return sum_over_rows(row_loss, logits, positions.rows)


def logits_at(logits: Tensor, positions: Positions) -> Tensor:
    """Return logits where some sequence has a loss: (batch, length, vocabulary) -> (batch * P, vocabulary)."""
    return logits[:, positions.columns].flatten(0, 1)
