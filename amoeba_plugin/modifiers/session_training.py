"""Recipes in a training that somebody else drives: what fires llm-compressor's training events from a Trainer.

llm-compressor defines the events and fires none of them since 0.9. With these, its recipes are trained again::

    class SessionTrainer(TrainingEventsMixin, Trainer): ...

    model = begin_session("recipe.yaml", model, calibration_batches, train_dataset)
    SessionTrainer(model=model, train_dataset=train_dataset, callbacks=[TrainingEventsCallback()], ...).train()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from llmcompressor.core import active_session, callbacks
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.modifiers.selection import selection_for
from amoeba_plugin.training.checkpoints import is_over

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


def begin_session(
    recipe: str, model: PreTrainedModel, calibration: Iterable[Batch], train_data: Any
) -> PreTrainedModel | PeftModel:
    """Start llm-compressor's session on a model that an external trainer is going to train.

    Args:
        recipe: Path or text of a recipe whose last modifier trains.
        model: Full-precision causal LM.
        calibration: Batches that selection works with.
        train_data: What will be trained on; that there is some tells the modifiers not to train themselves.

    Returns:
        What to train: the model, or the ``PeftModel`` around it.
    """
    session = active_session()
    session.reset()
    session.initialize(recipe=recipe, model=model, calib_data=calibration, train_data=train_data, copy_data=False)
    return selection_for(session.state).peft_model or model


class TrainingEventsMixin(_Base):
    """Put before ``transformers.Trainer``: every micro-batch fires BATCH_START and LOSS_CALCULATED."""

    _step_batches: list[Mapping[str, Any]]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return Trainer's micro-batches of a step and their number of targets; note the former."""
        if is_over(self.state):  # of a training resumed after its last step
            self.control.should_training_stop = True
            return [], None
        self._step_batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._step_batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Let the session's modifiers replace the loss; what they differentiated themselves needs no backward."""
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):  # as Trainer does, for schedule-free ones
            train()
        inputs = self._prepare_inputs(inputs)
        callbacks.batch_start(batch_data=inputs, global_step=self.state.global_step)
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(
                model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if num_items_in_batch is None:
            loss = loss / self.current_gradient_accumulation_steps
        found = callbacks.loss_calculated(
            loss=loss,
            outputs=outputs,
            model=model,
            backward=self.accelerator.backward,
            num_items_in_batch=num_items_in_batch,
            micro_batches=self.current_gradient_accumulation_steps,
            step_batches=self._step_batches,
            global_step=self.state.global_step,
        ).loss
        loss = loss if found is None else found  # a recipe may have no modifier that cares
        self.accelerator.backward(loss)
        detached: Tensor = torch.as_tensor(loss).detach()
        return detached


class TrainingEventsCallback(TrainerCallback):
    """Fires what comes after the micro-batches, and ends the session."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fire OPTIM_PRE_STEP."""
        callbacks.optim_pre_step(global_step=state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fire OPTIM_POST_STEP."""
        callbacks.optim_post_step(global_step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fire BATCH_END."""
        callbacks.batch_end(global_step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finalize the session: modifiers write what they have."""
        active_session().finalize()
