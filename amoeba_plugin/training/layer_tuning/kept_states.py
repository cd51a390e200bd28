"""Hidden states kept by key, in memory or in safetensors files, as many as a limit allows."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from amoeba_plugin.runtime.files import write_atomically

GIB = 2**30


class KeptStates:
    """States of rows, (length, hidden), that were computed by the same weights; others are forgotten.

    Args:
        gib: Of tensors at most; what comes after is not kept.
        directory: Where files go, which a later process finds again; ``None``: in memory.
    """

    def __init__(self, gib: float, directory: Path | None = None) -> None:
        self._limit, self._directory = int(gib * GIB), directory
        self._weights, self._used = "", 0
        self._held: dict[str, tuple[Tensor, bool]] = {}

    def begin(self, weights: str) -> None:
        """Keep what these weights compute from now on, and forget what others did."""
        self._weights, self._used, self._held = weights, 0, {}
        if self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for other in self._directory.iterdir():
            if other.is_dir() and other.name != weights:
                shutil.rmtree(other, ignore_errors=True)  # another process may do the same
        self._place.mkdir(exist_ok=True)
        self._used = sum(path.stat().st_size for path in self._place.glob("*.safetensors"))

    def get(self, key: str) -> tuple[Tensor, bool] | None:
        """Return states, and whether layers return them in tuples; ``None`` where they are not kept."""
        if self._directory is None:
            return self._held.get(key)
        try:
            with safe_open(self._file(key), framework="pt") as file:
                return file.get_tensor("states"), (file.metadata() or {}).get("in_tuples") == "True"
        except (OSError, SafetensorError):  # there is none, or it is damaged and made anew
            return None

    def put(self, key: str, states: Tensor, in_tuples: bool) -> None:
        """Keep states, where there is room."""
        if self._used + states.nbytes > self._limit:
            return
        self._used += states.nbytes
        states = states.detach().cpu().contiguous()
        if self._directory is None:
            self._held[key] = (states, in_tuples)
        else:
            write_atomically(self._file(key), save({"states": states}, {"in_tuples": str(in_tuples)}))

    @property
    def _place(self) -> Path:
        assert self._directory is not None
        return self._directory / self._weights

    def _file(self, key: str) -> Path:
        return self._place / f"{key}.safetensors"
