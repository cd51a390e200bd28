"""What one-for-all training refuses, before it begins and while it runs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.errors import TrainingError
from amoeba_plugin.sharded import all_finite
from amoeba_plugin.training_options import OneForAllOptions


class WholeLayers(TrainerCallback):
    """Stops where FSDP does not shard the decoder layers one by one: what a subnet drops could not be told apart."""

    def __init__(self, trainer: Trainer, elastic: ElasticModel) -> None:
        self._trainer, self._elastic = trainer, elastic

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the layers as accelerate has wrapped them."""
        layers = self._elastic.layers
        if self._trainer.is_fsdp_enabled and not all(isinstance(layer, FSDPModule) for layer in layers):
            raise TrainingError(
                f"FSDP does not shard every {type(layers[0]).__name__} by itself; leave auto_wrap_policy and "
                "transformer_layer_cls_to_wrap out of fsdp_config"
            )


class FiniteGradients(TrainerCallback):
    """Stops before a gradient that is not finite reaches the parameters: a loss can be finite all the same."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients as they are after clipping."""
        model = self._trainer.model
        if self._trainer.accelerator.scaler is not None or model is None:  # fp16: the scaler skips such steps
            return
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        if gradients and not all_finite(gradients):
            model.zero_grad()
            raise TrainingError(
                f"the gradient at step {state.global_step} is not finite; no parameter was changed by this step, and "
                "the checkpoints written before are good. Lower the learning rate"
            )


def require_follows(model: nn.Module, elastic: ElasticModel) -> None:
    """Refuse a SMOL adapter whose router is not told the active shape: it would train at the largest only.

    Raises:
        TrainingError: If it is not told.
    """
    if not hasattr(model, "set_shape"):
        return
    with elastic.active(elastic.space.smallest):
        told = str(model.shape) == str(elastic.space.smallest)
    if not told:
        raise TrainingError(
            "the adapter does not follow the elastic model's shape; connect it with "
            "elastic.on_shape_change(lambda shape: peft_model.set_shape(shape, elastic.listed(shape)))"
        )


def require_supported(trainer: Trainer, options: OneForAllOptions) -> None:
    """Refuse arguments of Trainer, or of accelerate's launcher, that this training cannot follow.

    Raises:
        TrainingError: It says what is possible instead.
    """
    if trainer.args.n_gpu > 1:
        raise TrainingError(
            "one process with several GPUs (DataParallel) is not supported; start one per GPU with torchrun"
        )
    if trainer.is_deepspeed_enabled:
        raise TrainingError("DeepSpeed is not supported; use DDP or FSDP2 through accelerate or torchrun")
    if trainer.is_fsdp_enabled:
        _require_supported_fsdp(trainer)
    if trainer.args.label_smoothing_factor:
        raise TrainingError(
            "label_smoothing_factor is not supported: subnets learn from the teacher's distribution; set it to 0"
        )
    if options.conflict_every and trainer.accelerator.num_processes > 1:
        raise TrainingError(
            "conflict_every compares the gradients of one process; measure in a run with one, or set it to 0"
        )


def _require_supported_fsdp(trainer: Trainer) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise TrainingError(
            "FSDP version 1 is not supported: it exchanges a layer's gradients only in a backward that runs the layer, "
            "and the last subnet of a step lacks layers; set fsdp_config={'version': 2} (accelerate: fsdp_version: 2), "
            "or use DDP"
        )
    if plugin.activation_checkpointing:
        raise TrainingError(
            "fsdp_config's activation_checkpointing wraps the layers in others, which no subnet exchanges; use "
            "gradient_checkpointing=True instead"
        )
