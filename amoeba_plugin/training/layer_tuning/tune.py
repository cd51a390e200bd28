"""Layer tuning as one call, up to the votes of the exits; the model is left as it was found, but for its parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from amoeba_plugin.errors import DataError
from amoeba_plugin.training.as_found import as_found
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.trainer import AdaptiveLayerTuningTrainer, exit_loss
from amoeba_plugin.training.progress import LossProgress

logger = logging.getLogger(__name__)
SHORTER = "less max_steps, gradient_accumulation_steps or batch_size, or a smaller window"


def tune_layers(
    model: PreTrainedModel | PeftModel,
    exits: Exits,
    train_dataset: Sequence[Any],
    options: LayerTuningOptions,
    arguments: TrainingArguments,
) -> TrainOutput:
    """Train a window of layers at a time.

    Args:
        model: The model that has the exits, or the ``PeftModel`` around it.
        exits: Of the model.
        train_dataset: Rows with ``input_ids`` and ``labels``, of any lengths.
        options: Which windows, when, and how the layers below them run.
        arguments: Trainer's; ``resume_from_checkpoint`` is followed.

    Raises:
        DataError: If there is nothing to train on.
        TrainingError: If there is nothing to train, or the training cannot go on.
    """
    if not len(train_dataset):
        raise DataError("there is no row to train on; give more text")
    with as_found(exits.model, model.modules()), torch.enable_grad():
        trainer = AdaptiveLayerTuningTrainer(
            model, exits, options, args=arguments, train_dataset=train_dataset
        )  # fmt: skip
        names = {depth: exit_loss(depth) for depth in exits.depths}
        if not arguments.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            shown = {name: f"at {depth}" for depth, name in names.items()}
            trainer.add_callback(LossProgress("layer tuning", shown, SHORTER))
        output = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        for depth, name in names.items():
            losses = [logs[name] for logs in trainer.state.log_history if name in logs]
            if losses:
                logger.info("the exit at %d: loss %.3f -> %.3f", depth, losses[0], losses[-1])
    return output
