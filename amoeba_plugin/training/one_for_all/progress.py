"""The progress bar of one-for-all training: time left, and the losses of largest and smallest subnet beside it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from amoeba_plugin.runtime.progress import tell_pace
from amoeba_plugin.shape import ShapeSpace


class SubnetProgress(ProgressCallback):
    """Trainer's progress bar, which shows two losses where Trainer would print every number that was logged.

    Args:
        space: Its largest and smallest shapes are shown.
    """

    def __init__(self, space: ShapeSpace) -> None:
        super().__init__()
        self._shown = [str(space.largest), str(space.smallest)]
        self._told = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar on; say once how long the training will take."""
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        bar: Any = self.training_bar
        if not self._told and bar is not None:
            about = bar.format_dict
            self._told = tell_pace(
                "one-for-all training", about["n"] - about["initial"], about["total"] - about["initial"],
                about["elapsed"], "less max_steps, gradient_accumulation_steps, batch_size or num_random",
            )  # fmt: skip

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the last logged means of ``loss/SHAPE``, nats per token, beside the bar, on the first process alone."""
        bar: Any = self.training_bar
        if state.is_world_process_zero and bar is not None and logs is not None:
            losses = {shape: logs[f"loss/{shape}"] for shape in self._shown if f"loss/{shape}" in logs}
            if losses:
                bar.set_description("one-for-all training")
                bar.set_postfix_str(", ".join(f"loss {shape} {loss:.3f}" for shape, loss in losses.items()))
