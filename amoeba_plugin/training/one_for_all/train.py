"""One-for-all training as one call; the model is left as it was found, but for its parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import TrainingError
from amoeba_plugin.shape import ShapeSpace
from amoeba_plugin.training.as_found import as_found
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from amoeba_plugin.training.progress import LossProgress

logger = logging.getLogger(__name__)
SHORTER = "less max_steps, gradient_accumulation_steps, batch_size or num_random"


def train_one_for_all(
    elastic: ElasticModel,
    model: PreTrainedModel | PeftModel,
    train_dataset: Any,
    options: OneForAllOptions,
    arguments: TrainingArguments,
    eval_dataset: Any = None,
    callbacks: list[TrainerCallback] | None = None,
) -> TrainOutput:
    """Train and leave the model as it was found, but for its parameters; the largest shape is active.

    Args:
        elastic: Switches the shape; the largest is active afterwards.
        model: Its own model, or the ``PeftModel`` around it; what requires a gradient is trained.
        train_dataset: Rows with ``input_ids`` and ``labels``, of any lengths.
        options: Of the objective and the sampling.
        arguments: Trainer's; ``resume_from_checkpoint`` is followed.
        eval_dataset: Like ``train_dataset``; evaluated as :class:`OneForAllTrainer` does.
        callbacks: Added to those that Trainer has anyway.

    Raises:
        DataError: If there is nothing to train on.
        TrainingError: If nothing requires a gradient, or the training cannot go on.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("no parameter requires a gradient; put an adapter on the model, or unfreeze it")
    with _as_found(elastic, model), torch.enable_grad():
        elastic.set_shape(elastic.space.largest)
        trainer = OneForAllTrainer(
            model,
            elastic,
            options,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        if trainer.is_fsdp_enabled:
            raise TrainingError(
                "FSDP leaves the model sharded, and a recipe goes on with the whole one; use DDP, or OneForAllTrainer "
                "with FSDP2 and save_elastic after it"
            )
        if not arguments.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            shown = {f"loss/{shape}": str(shape) for shape in (elastic.space.largest, elastic.space.smallest)}
            trainer.add_callback(LossProgress("one-for-all training", shown, SHORTER))
        output = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        _tell(output, trainer.state.log_history, elastic.space)
        return output


def _tell(output: TrainOutput, history: list[dict[str, float]], space: ShapeSpace) -> None:
    """Log the losses of largest and smallest subnet, as means over the first and the last window that was logged."""
    told = []
    for shape in (space.largest, space.smallest):
        losses = [logs[f"loss/{shape}"] for logs in history if f"loss/{shape}" in logs]
        if losses:
            told.append(f"loss {shape} {losses[0]:.3f} -> {losses[-1]:.3f}")
    logger.info("one-for-all training ended at step %d%s", output.global_step, f": {', '.join(told)}" if told else "")


@contextmanager
def _as_found(elastic: ElasticModel, model: nn.Module) -> Iterator[None]:
    """Give back what training sets on a model; activate the largest shape."""
    modules = [*model.modules(), *(module for layer in elastic.layers for module in layer.modules())]
    with as_found(elastic.model, modules):
        try:
            yield
        finally:
            elastic.set_shape(elastic.space.largest)
