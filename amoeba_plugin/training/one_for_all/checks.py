"""What one-for-all training refuses, before it begins and while it runs."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from amoeba_plugin.elastic.linear import ElasticLinear
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import TrainingError
from amoeba_plugin.models.partial_linear import PartialLinear
from amoeba_plugin.runtime.fsdp import all_finite
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions


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
    """Refuse a model that is another one than the elastic model switches, or whose adapter does not follow its shape.

    A SMOL adapter whose router is not told the shape would train at the largest only.

    Raises:
        TrainingError: It says what to do.
    """
    if not any(module is elastic.model for module in model.modules()):
        raise TrainingError(
            "the model given is neither the elastic model's own nor a PeftModel around it: it would train at one shape "
            "only; give elastic.model, or what attach_smol(elastic, ...) or attach_lora(elastic, ...) returned"
        )
    if len(elastic.space.widths) > 1 and any(map(_is_whole_lora, model.modules())):
        raise TrainingError(
            "the LoRA keeps its whole size where a narrow shape computes with a part of the channels; put it on with "
            "attach_lora(elastic, LoraConfig(...)), or let it follow with follow_lora(elastic, peft_model)"
        )
    if not hasattr(model, "set_shape"):
        return
    with elastic.active(elastic.space.smallest):
        told = str(model.shape) == str(elastic.space.smallest)
    if not told:
        raise TrainingError(
            "the adapter does not follow the elastic model's shape; connect it with "
            "elastic.on_shape_change(lambda shape: peft_model.set_shape(shape, elastic.listed(shape)))"
        )


def _is_whole_lora(module: nn.Module) -> bool:
    return (
        isinstance(module, LoraLayer)
        and isinstance(module.get_base_layer(), PartialLinear)
        and not all(isinstance(factor, ElasticLinear) for factor in module.lora_A.values())
    )


def require_supported(trainer: Trainer, options: OneForAllOptions) -> None:
    """Refuse arguments of Trainer, or of accelerate's launcher, that this training cannot follow.

    Raises:
        TrainingError: It says what is possible instead.
    """
    _require_supported_processes(trainer)
    _require_own_loss(trainer)
    optim = OptimizerNames(trainer.args.optim).value
    if optim.endswith("layerwise") or "lomo" in optim:
        raise TrainingError(
            f"optim='{optim}' changes parameters in every backward, and a step has one of each "
            "subnet; take an optimizer that waits for all of them, such as adamw_torch"
        )
    config = getattr(trainer.model, "active_peft_config", None)
    if not options.train_largest and not (isinstance(config, SmolConfig) and not config.adapt_largest):
        raise TrainingError(
            "train_largest=False wants SMOL with SmolConfig(adapt_largest=False), which alone leaves the whole model "
            "as it is: what is learned for small shapes would change the teacher; set adapt_largest=False, or "
            "train_largest=True"
        )
    if options.conflict_every and trainer.accelerator.num_processes > 1:
        raise TrainingError(
            "conflict_every compares the gradients of one process; measure in a run with one, or set it to 0"
        )


def _require_supported_processes(trainer: Trainer) -> None:
    if trainer.args.n_gpu > 1:
        raise TrainingError(
            "one process with several GPUs (DataParallel) is not supported; start one per GPU with torchrun"
        )
    if trainer.is_deepspeed_enabled:
        raise TrainingError("DeepSpeed is not supported; use DDP or FSDP2 through accelerate or torchrun")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise TrainingError(
            "tensor, context and sequence parallelism are not supported: subnets slice whole weights, and losses are "
            "taken of whole sequences; leave them out of parallelism_config"
        )
    if trainer.is_fsdp_enabled:
        _require_supported_fsdp(trainer)


def _require_own_loss(trainer: Trainer) -> None:
    """Refuse what would change the loss of an evaluation, and not what subnets learn."""
    if trainer.args.label_smoothing_factor:
        raise TrainingError(
            "label_smoothing_factor is not supported: subnets learn from the teacher's distribution; set it to 0"
        )
    if trainer.compute_loss_func is not None:
        raise TrainingError(
            "compute_loss_func is not supported: OneForAllOptions say what subnets learn (loss, kd_weight); leave it "
            "out"
        )
    if getattr(trainer.compute_loss, "__func__", None) is not Trainer.compute_loss:
        raise TrainingError(
            f"{type(trainer).__name__} overrides compute_loss, which would change the evaluation alone: subnets learn "
            "what OneForAllOptions say (loss, kd_weight); override training_step for a term of your own, "
            "prediction_step for an evaluation of your own"
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
