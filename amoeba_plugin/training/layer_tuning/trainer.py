"""AdaptiveLayerTuningTrainer: a ``transformers.Trainer`` whose every step trains the window of layers below an exit.

(Edge-LLM, arXiv:2406.15758, section on adaptive layer tuning.) The forward stops at the exit, and layers below the
window run without a graph: backward, activations, gradients and, where asked for, optimizer states are those of a
window.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from amoeba_plugin.data.collator import PaddingCollator, require_targets
from amoeba_plugin.errors import TrainingError
from amoeba_plugin.runtime.compat import keep_differentiable
from amoeba_plugin.training.head_loss import HeadLoss
from amoeba_plugin.training.layer_tuning.bottom import Bottom
from amoeba_plugin.training.layer_tuning.candidates import candidates_of
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.kept_states import KeptStates
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.windows import Schedule, Window, require_weights, windows_below
from amoeba_plugin.training.next_token import Positions, next_token_rows, target_positions


class AdaptiveLayerTuningTrainer(Trainer):
    """Trains a model, or the adapter on it, a window of layers at a time; between steps the model is whole.

    The logged ``loss`` is that of the exits that were drawn; beside it are logged ``loss/exit_DEPTH``, means over the
    logging window. An evaluation measures every exit in one pass, as ``eval_loss_exit_DEPTH``; ``eval_loss`` is that of
    the deepest one.

    Args:
        model: What is trained: the model that has the exits, whose layers and exits' norms learn, or the ``PeftModel``
            around it (LoRA or SMOL, with ``modules_to_save=exits.modules_to_save``), on a base of any precision.
        exits: Of the model.
        options: Which windows, when, and how the layers below them run.
        trainer_kwargs: Of ``transformers.Trainer``: ``args``, ``train_dataset``, ... Without a ``data_collator``, rows
            are padded by :class:`~amoeba_plugin.data.collator.PaddingCollator`.

    Raises:
        TrainingError: If the arguments ask for what this training cannot do, or there is nothing to train.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        exits: Exits,
        options: LayerTuningOptions | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        self.exits, self.options = exits, options or LayerTuningOptions()
        self.windows = windows_below(exits.depths, self.options.window, apart=not exits.stacked)
        self.candidates = candidates_of(model, exits, self.windows)
        if trainer_kwargs.get("data_collator") is None:  # Trainer's own stacks rows, and wants one length
            trainer_kwargs["data_collator"] = PaddingCollator.of(exits.config)
        super().__init__(model=model, **trainer_kwargs)
        if self.args.ddp_find_unused_parameters is None:
            self.args = copy.copy(self.args)
            self.args.ddp_find_unused_parameters = True  # every window leaves most of them out
        self._require_supported()
        keep_differentiable(exits.model)  # layers below a window are evaluated, and trained in a later step
        self.head_loss = HeadLoss(exits.model, may_chunk=not self.args.torch_compile)
        kept = KeptStates(self.options.cache_gib, self.options.cache_dir) if self.options.cache_gib else None
        trained = frozenset(id(value) for value in self.candidates.thaw())
        self.bottom = Bottom(exits, self.options.dtype_below(_dtype(exits)), kept, trained)
        self._window: Window | None = None
        self._means: dict[str, list[Tensor]] = {}  # of the logging window
        self._sums: dict[int, list[Tensor]] = {}  # of an evaluation

    @property
    def schedule(self) -> Schedule:
        """Says which window each step of this training trains."""
        options = self.options
        return Schedule(
            self.windows, options.policy, options.weights, options.phase_steps, self.state.max_steps, self.args.seed
        )

    def window_at(self, step: int) -> Window:
        """Return the window that an optimizer step trains."""
        return self.schedule.at(step)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does; afterwards all that some window trains requires gradients again."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.candidates.thaw()
            self._window = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's; refuses a data set without a target token."""
        require_targets(self.train_dataset)
        return super().get_train_dataloader()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make Trainer's, with all that some window trains."""
        self.candidates.thaw()
        self._window = None
        return super().create_optimizer(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Train the window of this optimizer step on a micro-batch; return its part of the step's loss, () fp32."""
        window = self.window_at(self.state.global_step)
        if window != self._window:
            self._enter(window)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the window's exit; outside a training, that of the deepest exit, as Trainer does."""
        if not self.exits.model.training or self._window is None:
            with self.exits.active(self.exits.depths[-1]):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs, positions = _split(inputs)
        window = self._window
        row_loss = next_token_rows(positions)
        with self._running(window, inputs):
            loss = self.head_loss(model, inputs, positions, row_loss)
        if not bool(loss.detach().isfinite()):
            model.zero_grad()
            raise TrainingError(
                f"the loss of the exit at {window.depth} is {loss.item()} at step {self.state.global_step}; no "
                "parameter was changed by this step. Lower the learning rate, or clip gradients (max_grad_norm)"
            )
        self._means.setdefault(exit_loss(window.depth), []).append(loss.detach())
        if num_items_in_batch is None:
            return loss
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * (positions.num_targets * scale / num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Measure every exit in one pass; what is returned, logits where they are asked for, is of the deepest one."""
        prepared = self._prepare_inputs(inputs)
        if "labels" not in prepared:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self.exit_losses(prepared)
        rows = len(prepared["input_ids"])
        for depth, loss in zip(self.exits.depths, losses, strict=True):
            self._sums.setdefault(depth, []).append(torch.stack([loss * rows, torch.full_like(loss, rows)]))
        if prediction_loss_only:
            return losses[-1], None, None
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def exit_losses(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the next-token cross-entropy at every exit, from below, () fp32 nats each, by one pass."""
        inputs, positions = _split(inputs)
        row_loss = next_token_rows(positions)
        losses = []
        for depth, begun in zip(self.exits.depths, self.exits.begun(inputs), strict=True):
            with self.exits.going_on(depth, begun) as model:
                losses.append(self.head_loss(model, inputs, positions, row_loss))
        return losses

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does; the metrics have a loss for every exit."""
        self._sums = {}
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = dict(output.metrics or {})
        for depth, parts in self._sums.items():
            total, rows = self.accelerator.reduce(torch.stack(parts).sum(dim=0)).tolist()
            metrics[f"{metric_key_prefix}_loss_exit_{depth}"] = total / rows
        return output._replace(metrics=metrics)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, and the exits' losses beside the loss."""
        if "loss" in logs:
            for name in list(self._means):
                logs[name] = torch.stack(self._means.pop(name)).mean().item()
        super().log(logs, *args, **kwargs)

    def _enter(self, window: Window) -> None:
        outside = self.candidates.freeze_outside(window)
        self._window = window
        self.bottom.forget_weights()
        if not self.options.keep_states and self.optimizer is not None:
            states = getattr(self.optimizer, "optimizer", self.optimizer).state
            for parameter in outside:
                states.pop(parameter, None)

    def _running(self, window: Window, inputs: Mapping[str, Any]) -> AbstractContextManager[PreTrainedModel]:
        """Let the model run a window alone, on what the layers below it give, for a block of code."""
        if window.first == 0:
            return self.exits.active(window.depth)
        states, in_tuples = self.bottom.states(window.first, inputs)
        return self.exits.resumed(window.depth, window.first, states, in_tuples)

    def _require_supported(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TrainingError("layer tuning runs in one process or by DDP; FSDP and DeepSpeed are not supported")
        if self.args.n_gpu > 1:
            raise TrainingError("one process with several GPUs is not supported; start one per GPU with torchrun")
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise TrainingError(
                "exits learn from the next token alone; leave label_smoothing_factor and compute_loss_func out"
            )
        require_weights(self.options.weights, len(self.windows))
        self.options.require_cache_is_read(len(self.windows), self.exits.stacked)


def exit_loss(depth: int) -> str:
    """Return the name under which the loss of an exit is logged."""
    return f"loss/exit_{depth}"


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Positions]:
    """Return a batch without its labels, and where it has losses."""
    labels = inputs["labels"]
    return {name: value for name, value in inputs.items() if name != "labels"}, target_positions(labels)


def _dtype(exits: Exits) -> torch.dtype:
    dtype: torch.dtype = exits.model.dtype
    return dtype
