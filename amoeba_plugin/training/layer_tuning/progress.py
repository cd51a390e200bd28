"""The progress bar of layer tuning: time left, and the losses of the exits beside it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

PREFIX = "loss/exit_"


class ExitProgress(ProgressCallback):
    """Trainer's progress bar, which shows every exit's last loss where Trainer would print all that was logged."""

    def __init__(self) -> None:
        super().__init__()
        self._losses: dict[int, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the last logged means of the exits' losses, nats per token, on the first process alone."""
        bar: Any = self.training_bar
        if not state.is_world_process_zero or bar is None or logs is None:
            return
        self._losses |= {int(name.removeprefix(PREFIX)): value for name, value in logs.items()
                         if name.startswith(PREFIX)}  # fmt: skip
        bar.set_description("layer tuning")
        told = (f"loss at {depth} {loss:.3f}" for depth, loss in sorted(self._losses.items()))
        bar.set_postfix_str(", ".join(told))
