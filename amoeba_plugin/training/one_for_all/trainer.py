"""OneForAllTrainer: a ``transformers.Trainer`` whose every micro-batch trains all kinds of subnets of an elastic model.

What works with Trainer works here; the step itself is :mod:`amoeba_plugin.training.one_for_all.step`.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from amoeba_plugin.data.collator import PaddingCollator, require_targets
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import TrainingError
from amoeba_plugin.runtime.compat import keep_differentiable
from amoeba_plugin.runtime.fsdp import exchange_gradients, gathered
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.training.checkpoints import (
    could_not_write,
    is_complete,
    is_over,
    last_complete_checkpoint,
)
from amoeba_plugin.training.next_token import Positions
from amoeba_plugin.training.one_for_all.checks import FiniteGradients, WholeLayers, require_follows, require_supported
from amoeba_plugin.training.one_for_all.evaluation import (
    EvalShapes,
    of_shape,
    restart_bars,
    shapes_to_measure,
    with_direction,
)
from amoeba_plugin.training.one_for_all.metrics import routing_log
from amoeba_plugin.training.one_for_all.micro_batch import MicroBatch, Share
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.sandwich import SandwichSampler
from amoeba_plugin.training.one_for_all.step import StepHost, SubnetStep

logger = logging.getLogger(__name__)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class OneForAllTrainer(Trainer):
    """Trains all subnets of an elastic model at once.

    Between steps the largest shape is active: saving sees the whole model.

    An evaluation measures the active shape, whose metrics have Trainer's names (``eval_loss``; during training it is
    the largest), and every one of ``eval_shapes``, whose metrics end in the shape (``eval_loss_10x7/8``). Seconds, and
    samples per second, are those of all of them together. ``metric_for_best_model`` takes any of these names; of a
    shape's loss the lower is better, whatever ``greater_is_better`` says. ``predict`` runs the active shape alone.

    The logged ``loss`` is the largest subnet's next-token cross-entropy. Beside it are logged, as means over the
    logging window, ``loss/SHAPE`` (before balancing), ``balance/SHAPE`` (the ratio) and, with ``conflict_every``,
    ``conflict/SHAPE~SHAPE`` (the cosine of two subnets' gradients); for SMOL also ``router/SHAPE/expert_I`` and
    ``router/SHAPE/entropy`` (nats), of the mixture without noise as it is now.

    With several processes (DDP or FSDP2) all draw the same shapes, a balancing ratio is that of all their losses
    together, and gradients are exchanged once per optimizer step. FSDP2 adds them up unsharded until then, as large as
    what is trained; with ``sync_each_batch`` of accelerate's ``gradient_accumulation_kwargs`` they are exchanged, and
    sharded, after every subnet.

    Subclasses: ``training_step`` is a micro-batch with all its subnets, ``evaluation_loop`` evaluates every shape by
    ``prediction_step``, and the other methods are Trainer's. ``compute_loss`` is refused: Trainer's own is the loss of
    one forward, and here ``SubnetStep`` takes the losses, where the head stands. A term of one's own belongs into
    ``training_step``: differentiate it by ``self.accelerator.backward``, and return what ``super()``'s returns. An
    evaluation of one's own belongs into ``prediction_step``.

    Args:
        model: What is trained: the elastic model's own, or the ``PeftModel`` around it.
        elastic: Switches its shape.
        options: Of the objective and the sampling.
        eval_shapes: What evaluations measure beside the active shape; "all": the whole space. Default: the largest and
            the smallest.
        trainer_kwargs: Of ``transformers.Trainer``: ``args``, ``train_dataset``, ... Without a ``data_collator``, rows
            are padded by :class:`~amoeba_plugin.data.collator.PaddingCollator`.

    Raises:
        TrainingError: If the arguments ask for what this training cannot do, or the adapter does not follow the shape.
        ShapeError: If a shape that is sampled or evaluated is not in the space.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        elastic: ElasticModel,
        options: OneForAllOptions,
        *,
        eval_shapes: EvalShapes = None,
        **trainer_kwargs: Any,
    ) -> None:
        self._eval_shapes = shapes_to_measure(elastic.space, eval_shapes)
        require_follows(model, elastic)
        if trainer_kwargs.get("data_collator") is None:  # Trainer's own stacks rows, and wants one length
            trainer_kwargs["data_collator"] = PaddingCollator.of(elastic.config)
        with elastic.active(elastic.space.largest):  # Trainer moves to a device what it sees
            super().__init__(model=model, **trainer_kwargs)
        if self.args.ddp_find_unused_parameters is None:
            self.args = copy.copy(self.args)
            self.args.ddp_find_unused_parameters = True  # layers a subnet drops get no gradient from it
        require_supported(self, options)
        keep_differentiable(elastic.model)
        self.elastic = elastic
        self.args = with_direction(self.args, self._measured(elastic.space.largest))
        self.options = options
        host = StepHost(
            lambda loss: self.accelerator.backward(loss),
            self._synchronized,
            self._mean_over_processes,
            HALF.get(self.accelerator.mixed_precision),
        )
        # FSDP casts what the model returns: a loss would lose its digits, logits lose none
        casts = self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"
        # torch.compile makes one graph for all subnets: no head is exchanged in it
        may_chunk = not (self.args.torch_compile or casts)
        self.subnets = SubnetStep(model, elastic, options, self.args.seed, host, may_chunk)
        self._micro_step = (-1, 0)  # optimizer step, micro-batches of it seen so far
        # Positions that the optimizer step distils, where they are counted: Trainer hands on the targets' number alone.
        self._num_distilled: Tensor | None = None
        self.add_callback(WholeLayers(self, elastic))
        self.add_callback(FiniteGradients(self))

    @property
    def sampler(self) -> SandwichSampler:
        """Draws the shapes of each micro-batch, from the seed and the step alone: resuming draws the same."""
        return self.subnets.sampler

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does, with the largest shape active, so that hosts see every layer and parameter.

        Args:
            resume_from_checkpoint: Trainer's; True: the last checkpoint that is whole, passing over one whose saving
                was interrupted.
            args: As ``Trainer.train`` takes them.
            kwargs: As ``Trainer.train`` takes them.

        Raises:
            TrainingError: If the checkpoint named was not written to its end.
        """
        if resume_from_checkpoint:
            named = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            resume_from_checkpoint = str(self._whole_checkpoint(named))
            logger.info("one-for-all training goes on from %s", resume_from_checkpoint)
        self.elastic.set_shape(self.elastic.space.largest)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, named: Path | None) -> Path:
        if named is not None and is_complete(named):
            return named
        directory = Path(self.args.output_dir or ".") if named is None else named.parent
        last = last_complete_checkpoint(directory)
        if named is None and last is not None:
            return last
        advice = f"go on from {last}" if last else "start again"
        what = f"no checkpoint in {directory} was" if named is None else f"the checkpoint {named} was not"
        raise TrainingError(f"{what} written to its end; {advice}")

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's; refuses a data set without a target token."""
        require_targets(self.train_dataset)
        self._micro_step = (-1, 0)
        return super().get_train_dataloader()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add up the gradients of all subnets of one micro-batch.

        Args:
            model: The model as wrapped for training.
            inputs: A micro-batch: ``input_ids``, ``labels``, each (batch, length) int64, perhaps an ``attention_mask``.
            num_items_in_batch: Target tokens of the whole optimizer step.

        Returns:
            The largest subnet's next-token cross-entropy times this micro-batch's share of the step's targets: () fp32.

        Raises:
            DataError: If the batch has no labels.
            TrainingError: If a loss is not finite; the gradients are cleared, the parameters untouched.
        """
        place = self._next_micro_step()
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):  # as Trainer does, for schedule-free ones
            train()
        inputs = self._prepare_inputs(inputs)
        positions = self.subnets.positions(inputs)
        alone = self.accelerator.num_processes == 1 and not self.is_fsdp_enabled
        if len(positions.rows) == 0 and alone:  # else others, or FSDP, wait for this backward to exchange gradients
            return torch.zeros((), device=positions.rows.device)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        share = self._share(positions, num_items_in_batch)
        loss = self.subnets.run(MicroBatch(model, inputs, positions, place, share))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def _synchronized(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between processes with the last subnet only, and only in the step's last micro-batch."""
        exchanges = last and self.accelerator.sync_gradients
        if self.is_fsdp_enabled:
            always = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
            exchange_gradients((model, *self.elastic.layers), exchanges or always)
            return nullcontext()
        if exchanges:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _mean_over_processes(self, loss: Tensor, count: int) -> Tensor:
        """A balancing ratio of each process's own would make the update depend on how rows are dealt out."""
        if self.accelerator.num_processes == 1:
            return loss
        sums: Tensor = self.accelerator.reduce(torch.stack([loss * count, loss.new_tensor(count)]), "sum")
        return sums[0] / sums[1].clamp(min=1)

    def _share(self, positions: Positions, targets_in_step: Tensor | int | None) -> Share:
        """Return which part of the optimizer step's positions a micro-batch has: the weight of its mean losses."""
        if targets_in_step is None:
            return Share.even(1 / self.current_gradient_accumulation_steps)
        # The step's loss is a mean over all its positions; where all processes count, DDP's mean is undone.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        share = Share.even(positions.num_targets * processes / torch.as_tensor(targets_in_step).clamp(min=1))
        if self._num_distilled is None:
            return share
        return share._replace(distilled=len(positions.rows) * processes / self._num_distilled.clamp(min=1))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return Trainer's micro-batches of a step and their number of targets; count what they distil.

        There are none where a training that is resumed has taken its last step already.
        """
        if is_over(self.state):
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.options.distill_all_tokens:
            count = torch.tensor(sum(len(self.subnets.positions(batch).rows) for batch in batches), device=device)
            across = self.args.average_tokens_across_devices
            self._num_distilled = self.accelerator.gather(count).sum() if across else count
        return batches, num_items

    def _next_micro_step(self) -> tuple[int, int]:
        step, seen = self._micro_step
        if step != self.state.global_step:
            step, seen = self.state.global_step, 0
        self._micro_step = (step, seen + 1)
        return step, seen

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate all shapes, as Trainer does one; a prediction is of the active shape.

        Returns:
            What Trainer's loop returns at the active shape, with the metrics of all shapes.
        """
        if description != "Evaluation":
            return super().evaluation_loop(dataloader, description, *args, **kwargs)
        metrics: dict[str, float] = {}
        for shape in self._measured(self.elastic.shape):
            restart_bars(self.callback_handler.callbacks)
            with self.elastic.active(shape):
                output = super().evaluation_loop(dataloader, description, *args, **kwargs)
            metrics |= of_shape(output.metrics or {}, shape)
            if shape == self.elastic.shape:
                active: EvalLoopOutput = output
        return active._replace(metrics={**(active.metrics or {}), **metrics})

    def _measured(self, active: SubnetShape) -> list[SubnetShape]:
        """Return the shapes that an evaluation measures, largest first: the first pass moves and casts what it sees."""
        return sorted({*self._eval_shapes, active}, reverse=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding the subnets' means to what Trainer logs of the training."""
        if "loss" in logs or "train_loss" in logs:
            shapes, means = self.subnets.means.flush()
            logs.update(means)
            routing = getattr(self.model, "routing", None)
            if self.model is not None and routing is not None:
                with gathered(self.model):
                    logs.update(routing_log(routing, self.elastic, shapes))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does; what could not be written whole is taken away.

        Of more than ``save_total_limit`` checkpoints those of the fewest steps go. Trainer goes by the time of their
        files, and a clock that was set back would make it delete the one just written.

        Raises:
            TrainingError: If a file could not be written (a full disk). Other errors are left as they are.
        """
        directory = Path(self._get_output_dir(trial))
        checkpoint = directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:  # torch's of a sharded checkpoint is no Exception
            if not could_not_write(error) or is_complete(checkpoint):
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            last = last_complete_checkpoint(directory)
            advice = f"go on from {last} (resume_from_checkpoint)" if last else "start again"
            raise TrainingError(
                f"the checkpoint {checkpoint} cannot be written ({error}); make room on the disk, or name another "
                f"output directory, then {advice}"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(directory), limit, self.state.best_model_checkpoint)
