"""What layer tuning does beside what TrainingArguments say; values are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.runtime.dtypes import has_instructions
from amoeba_plugin.training.layer_tuning.windows import require_policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LayerTuningOptions:
    """What layer tuning does beside what ``TrainingArguments`` say.

    Args:
        window: Layers trained below an exit; ``None``: down to the exit below it.
        policy: Which exit a phase trains: "random", "cyclic" or "sequential" (once each, from below: Edge-LLM's code).
        weights: How often each exit is drawn, from below, or its share of a sequential training; empty: all alike.
        phase_steps: Optimizer steps between two draws.
        keep_states: Keep the optimizer's states of layers that leave the window. False: they start anew when the
            layers come back, and memory holds those of one window.
        bottom_dtype: What the layers below the window compute in, which need no gradient: a dtype's name, "same" as the
            window, or "auto": bfloat16 where weights are float32 and the machine has instructions for it.
        cache_gib: GiB of what comes out of these layers to be kept, so that the next epoch starts at the window.
        cache_dir: Where it is kept; ``None``: in memory.

    Raises:
        RecipeError: If a value is none that is possible, or a cache would never be read.
    """

    window: int | None = None
    policy: str = "random"
    weights: tuple[float, ...] = ()
    phase_steps: int = 1
    keep_states: bool = True
    bottom_dtype: str = "auto"
    cache_gib: float = 0.0
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise RecipeError(f"window {self.window}: give the layers below an exit that are trained, 1 or more")
        require_policy(self.policy, self.phase_steps)
        if self.bottom_dtype not in (*DTYPES, "auto", "same"):
            raise RecipeError(
                f"bottom_dtype '{self.bottom_dtype}' is unknown; choose one of {', '.join(DTYPES)}, auto, same"
            )
        if not 0 <= self.cache_gib < math.inf:
            raise RecipeError(f"cache_gib {self.cache_gib}: give GiB, or 0 to keep nothing")
        if self.cache_dir is not None and not self.cache_gib:
            raise RecipeError("cache_dir without cache_gib keeps nothing; say how many GiB it may hold")

    def require_cache_is_read(self, exits: int, stacked: bool) -> None:
        """Refuse a cache of what changes all the time: layers below stacked exits.

        Raises:
            RecipeError: It says with which policy a cache is of use.
        """
        if self.cache_gib and stacked and self.policy != "sequential" and exits > 1:
            raise RecipeError(
                f"cache_gib with policy '{self.policy}' and stacked exits: the layers below a window change between "
                "its steps; take policy sequential, or exits that are not stacked"
            )

    def dtype_below(self, weights: torch.dtype) -> torch.dtype | None:
        """Return the dtype that layers below the window are cast to, given that of their weights; ``None``: to none."""
        if self.bottom_dtype == "same":
            return None
        if self.bottom_dtype != "auto":
            return DTYPES[self.bottom_dtype]
        return torch.bfloat16 if weights == torch.float32 and has_instructions(torch.bfloat16) else None
