"""The layers below a window: run without a graph, in a dtype of their own; what they give can be kept for later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.kept_states import KeptStates

DIGEST = 16  # bytes of a key


@dataclass
class Bottom:
    """Runs the layers below a window, in evaluation mode: what they compute depends on the tokens alone.

    Attributes:
        exits: Of the model.
        dtype: What the layers are cast to while they run; ``None``: to nothing.
        kept: What came out of them before; ``None``: nothing is kept.
        trained: Parameters that some window trains, by ``id``; the base is without them, where exits are branches.
    """

    exits: Exits
    dtype: torch.dtype | None = None
    kept: KeptStates | None = None
    trained: frozenset[int] = frozenset()
    _in_tuples: bool = False
    _weights: tuple[int, str] = (0, "")

    def forget_weights(self) -> None:
        """Know that weights may have changed, so that what was kept is of others; the base's do not."""
        if self.exits.stacked:
            self._weights = (0, "")

    def states(self, first: int, inputs: Mapping[str, Any]) -> tuple[Tensor, bool]:
        """Return what comes into a layer.

        Args:
            first: Its index, at least 1.
            inputs: Of the model's forward, (batch, length) each, without labels.

        Returns:
            States, (batch, length, hidden), and whether layers return them as the first of several values. Where they
            are kept, those of padding on the right are 0.
        """
        if self.kept is None:
            return self._run(first, inputs)
        below = first if self.exits.stacked else len(self.exits.layers)
        if self._weights[0] != below:
            self._weights = (below, self._digest_of_weights(below))
            self.kept.begin(self._weights[1])
        length = inputs["input_ids"].shape[1]
        # each row alone: what it gives then does not depend on those beside it, and a resumed training sees the same
        rows = [self._row(first, row) for row in _rows(inputs)]
        return torch.stack([functional.pad(row, (0, 0, 0, length - len(row))) for row in rows]), self._in_tuples

    def _row(self, first: int, row: dict[str, Any]) -> Tensor:
        assert self.kept is not None
        key = f"{first}-{_digest(row.values())}"
        found = self.kept.get(key)
        if found is not None:
            states, self._in_tuples = found
            return states.to(row["input_ids"].device)
        states, self._in_tuples = self._run(first, row)
        self.kept.put(key, states[0], self._in_tuples)
        return states[0]

    def _run(self, first: int, inputs: Mapping[str, Any]) -> tuple[Tensor, bool]:
        device = inputs["input_ids"].device
        cast = nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)
        with evaluating(self.exits.model), cast:
            states, in_tuples = self.exits.states(inputs, [first])
        return states[0], in_tuples

    def _digest_of_weights(self, below: int) -> str:
        modules = [self.exits.model.get_input_embeddings(), *self.exits.layers[:below]]
        kept = self.trained if not self.exits.stacked else frozenset()
        tensors = (value.detach().cpu() for module in modules for value in _tensors(module) if id(value) not in kept)
        return f"{below}-{self._computing}-{_digest(tensors)}"

    @property
    def _computing(self) -> torch.dtype | None:
        """The dtype that layers are cast to: their own, or the training's."""
        kind = next(self.exits.model.parameters()).device.type
        around = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self.dtype or around


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _rows(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a batch, one to a batch, without the padding on their right."""
    mask = inputs.get("attention_mask")
    rows = []
    for number in range(len(inputs["input_ids"])):
        row = {name: value[number : number + 1] for name, value in inputs.items()}
        if mask is not None:
            length = int(mask[number].sum())
            if bool(mask[number, :length].all()):
                row = {name: value[:, :length] for name, value in row.items() if name != "attention_mask"}
        rows.append(row)
    return rows


def _digest(tensors: Any) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
