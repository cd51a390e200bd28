"""What modifiers that train have in common: text, steps, Trainer's arguments, and checkpoints to go on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from pydantic import Field
from torch import Tensor
from transformers import TrainingArguments

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.runtime.scratch import scratch_directory
from amoeba_plugin.training.checkpoints import last_complete_checkpoint, require_same_training

logger = logging.getLogger(__name__)
MANY_EPOCHS = 10  # over the calibration data, which is a sample for selection
ROW_COLUMNS = ("input_ids", "attention_mask", "labels")
# Where results go and what is looked at does not change them; the rest are fields that every modifier has.
NOT_OF_THE_TRAINING = {"checkpoint_dir", "save_steps", *Modifier.model_fields}


class TrainedModifier(Modifier):
    """A modifier that trains; its fields are explained where it is."""

    dataset: str | None = None
    dataset_split: str = "train"
    text_column: str | None = None
    num_samples: int = Field(default=10_000, ge=1)
    max_seq_length: int = Field(default=512, ge=2)
    max_steps: int = Field(default=10_000, ge=0)
    batch_size: int = Field(default=2, ge=1)
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    lr_scheduler_type: str = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=0.3, ge=0)
    gradient_checkpointing: bool = False
    seed: int = Field(default=42, ge=0, lt=2**32)  # what numpy takes
    checkpoint_dir: str | None = None
    save_steps: int = Field(default=500, ge=1)

    @contextmanager
    def training_directory(self, of: Mapping[str, Any], without: set[str]) -> Iterator[Path]:
        """Yield the directory of Trainer's checkpoints; a scratch one where none are to be kept.

        Args:
            of: What beside the fields must be the same for a training to go on.
            without: Fields that do not change what is trained.
        """
        if self.checkpoint_dir is None:
            with scratch_directory() as scratch:
                yield scratch
            return
        directory = Path(self.checkpoint_dir)
        names = set(type(self).model_fields) - NOT_OF_THE_TRAINING - without
        if rank() == 0:
            require_same_training(directory, {**of, **self.model_dump(mode="json", include=names)})
        yield directory

    def read_dataset(self, model: str, vocab_size: int) -> list[Batch]:
        """Return the sequences of ``dataset``, one to a batch.

        Args:
            model: Path or hub id of the model, for its tokenizer.
            vocab_size: Its tokens.

        Raises:
            DataError: If the data set cannot be read, or has none of the model's tokens.
        """
        assert self.dataset is not None
        return load_batches(
            self.dataset,
            load_tokenizer(model),
            split=self.dataset_split,
            num_samples=self.num_samples,
            max_seq_length=self.max_seq_length,
            batch_size=1,
            vocab_size=vocab_size,
            text_column=self.text_column,
            seed=self.seed,
        )

    def rows(self, model: str, vocab_size: int, calibration: list[Batch]) -> list[dict[str, Tensor]]:
        """Return what is trained on, a sequence each: of ``dataset``, or else of the calibration data."""
        batches = calibration if self.dataset is None else self.read_dataset(model, vocab_size)
        return [
            {name: batch[name][row] for name in ROW_COLUMNS}
            for batch in batches
            for row in range(len(batch["input_ids"]))
        ]

    def tell_repetition(self, rows: int) -> None:
        """Warn where calibration data is seen many times over."""
        epochs = self.max_steps * self.batch_size * self.gradient_accumulation_steps / max(1, rows)
        if self.dataset is None and epochs > MANY_EPOCHS:
            logger.warning(
                "%s sees the %d sequences of the calibration data %.0f times over; name more text in its dataset",
                type(self).__name__,
                rows,
                epochs,
            )

    def arguments(self, directory: Path) -> TrainingArguments:
        """Return Trainer's arguments."""
        saves = self.checkpoint_dir is not None
        last = last_complete_checkpoint(directory)
        arguments = TrainingArguments(
            output_dir=str(directory),
            resume_from_checkpoint=None if last is None else str(last),
            max_steps=self.max_steps,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            max_grad_norm=self.max_grad_norm,
            gradient_checkpointing=self.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if self.gradient_checkpointing else None,
            seed=self.seed,
            data_seed=self.seed,
            logging_steps=max(1, self.max_steps // 20),
            save_strategy="steps" if saves else "no",
            save_steps=self.save_steps,
            save_total_limit=2,
            disable_tqdm=False,  # else a quiet log level prints every logged number instead
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        if arguments.n_gpu > 1:  # of one process: Trainer would put the model on all of them, by DataParallel
            arguments._n_gpu = 1
        return arguments
