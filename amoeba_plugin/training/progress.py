"""The progress bar of a training: time left, and some losses beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from amoeba_plugin.runtime.progress import tell_pace


class LossProgress(ProgressCallback):
    """Trainer's progress bar, which shows some losses where Trainer would print every number that was logged.

    Args:
        stage: What trains, for people.
        shown: What stands beside the bar for a loss, by the name that it is logged under.
        shorter: What would shorten the training.
    """

    def __init__(self, stage: str, shown: Mapping[str, str], shorter: str) -> None:
        super().__init__()
        self._stage, self._shown, self._shorter = stage, shown, shorter
        self._losses: dict[str, float] = {}
        self._told = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar on; say once how long the training will take."""
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        bar: Any = self.training_bar
        if not self._told and bar is not None:
            about = bar.format_dict
            done, total = about["n"] - about["initial"], about["total"] - about["initial"]
            self._told = tell_pace(self._stage, done, total, about["elapsed"], self._shorter)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show each loss as it was last logged, nats per token, beside the bar, on the first process alone."""
        bar: Any = self.training_bar
        if state.is_world_process_zero and bar is not None and logs is not None:
            self._losses |= {name: logs[name] for name in self._shown if name in logs}
            told = [f"loss {label} {self._losses[name]:.3f}" for name, label in self._shown.items()
                    if name in self._losses]  # fmt: skip
            if told:
                bar.set_description(self._stage)
                bar.set_postfix_str(", ".join(told))
