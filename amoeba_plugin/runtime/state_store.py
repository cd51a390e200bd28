"""Tensors within a budget of memory: what exceeds it is held in files."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amoeba_plugin.runtime.full_disk import full_disk_named
from amoeba_plugin.runtime.scratch import scratch_directory


@dataclass
class StateStore:
    """A mapping from keys to tensors that come back on the device they came from.

    What exceeds the budget is held on the CPU if it came from an accelerator, and what exceeds it there in files.

    Attributes:
        budget: Bytes held on the accelerator, and as many again on the CPU.
        folder: Where the files go; exists as long as the store.
        peak: Most bytes held so far, by place: ``accelerator``, ``cpu``, ``disk``.
    """

    budget: float
    folder: Path
    peak: dict[str, int] = field(default_factory=dict)
    _held: dict[Hashable, tuple[str, Tensor | Path, torch.device, int]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=lambda: {"accelerator": 0, "cpu": 0, "disk": 0})
    _number: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    @contextmanager
    def of(cls, budget: float) -> Iterator[StateStore]:
        """Yield a store whose files vanish with the block."""
        with scratch_directory() as folder:
            yield cls(budget, folder)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, key: Hashable) -> Tensor:
        _, kept, device, _ = self._held[key]
        return kept.to(device) if isinstance(kept, Tensor) else load_file(kept, device=str(device))["states"]

    def __setitem__(self, key: Hashable, states: Tensor) -> None:
        if key in self._held:
            del self[key]
        size = states.numel() * states.element_size()
        place = self._place(size, states.device)
        kept: Tensor | Path
        if place == "disk":
            kept = self.folder / f"{next(self._number)}.safetensors"
            with full_disk_named(self.folder, "hidden states go there; free space, or set TMPDIR to another directory"):
                save_file({"states": states.contiguous()}, kept)
        else:
            kept = states if place == "accelerator" else states.cpu()
        self._held[key] = (place, kept, states.device, size)
        self._bytes[place] += size
        self.peak[place] = max(self.peak.get(place, 0), self._bytes[place])

    def __delitem__(self, key: Hashable) -> None:
        place, kept, _, size = self._held.pop(key)
        self._bytes[place] -= size
        if isinstance(kept, Path):
            kept.unlink()

    def rename(self, key: Hashable, new: Hashable) -> None:
        """Give what is held under ``key`` another key, without a copy."""
        self._held[new] = self._held.pop(key)

    def discard(self, key: Hashable) -> None:
        """Forget what is held under a key, if anything is."""
        if key in self._held:
            del self[key]

    def bytes_of(self, key: Hashable) -> int:
        """Return the size of what is held under a key; 0 where nothing is."""
        return self._held[key][3] if key in self._held else 0

    def clear(self) -> None:
        """Forget all tensors and delete their files; peaks stay."""
        for key in list(self._held):
            del self[key]

    def _place(self, size: int, device: torch.device) -> str:
        places = ("cpu",) if device.type == "cpu" else ("accelerator", "cpu")
        return next((place for place in places if self._bytes[place] + size <= self.budget), "disk")
