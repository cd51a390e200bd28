"""Fields of OneForAllDistillationModifier: the adapter's, and what some of them do nothing without."""

from __future__ import annotations

from typing import Literal

import torch
from llmcompressor.modifiers import Modifier
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from amoeba_plugin.errors import RecipeError, did_you_mean

LORA_FIELDS = ("type", "r", "lora_alpha", "lora_dropout", "target_modules")
EVALUATING = ("reduce_lr_on_plateau", "greedy")  # schedules that follow an evaluation, which a recipe has not
# Field -> the one without which it does nothing.
DEPENDENT = {
    "dataset_split": "dataset",
    "text_column": "dataset",
    "num_samples": "dataset",
    "max_seq_length": "dataset",
    "sampled_shapes": "num_random",
    "max_balance_ratio": "loss_balancing",
    "save_steps": "checkpoint_dir",
}


class AdapterOptions(BaseModel):
    """The adapter's settings; see :class:`amoeba_plugin.smol.SmolConfig` for the formulas.

    Attributes:
        type: ``smol``, or ``lora``: one plain LoRA for all shapes, which takes ``r``, ``lora_alpha``, ``lora_dropout``
            and ``target_modules`` alone. Default ``smol``.
        r: Rank of each expert. Default 64 (paper).
        lora_alpha: Scale is ``lora_alpha / r``. Default 16 (paper).
        num_experts: LoRAs per linear. Default 5 (reference code).
        top_k: Experts mixed at each shape. Default 2 (reference code).
        lora_dropout: Dropout before the adapter. Default 0.
        combination: ``outputs`` (the paper's figure) or ``factors`` (reference code). Default ``outputs``.
        target_modules: Names of the linears that get an adapter. Default: all linears of every decoder layer.
        router_noise: Noise on the router's logits in training. Default true (reference code).
        router_init: ``random`` (reference code), or ``widths``: every width starts with experts of its own, so that
            wide and narrow subnets disturb each other less. Default ``random``.
        router_temperature: Divides the router's logits before the softmax: below 1, shapes are told apart sooner.
            Default 1.
        router_load_balancing: Weight of the loss that makes the shapes use all experts. Default 0, off (reference
            code).
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["smol", "lora"] = "smol"
    r: int = Field(default=64, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    num_experts: int = Field(default=5, ge=1)
    top_k: int = Field(default=2, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    combination: Literal["outputs", "factors"] = "outputs"
    target_modules: list[str] | None = None
    router_noise: bool = True
    router_init: Literal["random", "widths"] = "random"
    router_temperature: float = Field(default=1.0, gt=0)
    router_load_balancing: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _lora_has_no_experts(self) -> AdapterOptions:
        fields = type(self).model_fields
        smol_only = [name for name in fields if name not in LORA_FIELDS and getattr(self, name) != fields[name].default]
        if self.type == "lora" and smol_only:
            raise RecipeError(f"adapter.{smol_only[0]} is SMOL's; leave it out, or set adapter.type to smol")
        return self

    @model_validator(mode="after")
    def _top_k_exists(self) -> AdapterOptions:
        if self.top_k > self.num_experts:
            raise RecipeError(
                f"adapter.top_k {self.top_k} of num_experts {self.num_experts}: choose at most all of them"
            )
        return self


def require_schedule(name: str, warmup_steps: int) -> None:
    """Refuse a schedule that does not exist, wants more than its name, or does not warm up where that is asked for.

    Raises:
        RecipeError: It lists those that a recipe can name.
    """
    possible = [each.value for each in SchedulerType if each.value not in EVALUATING and _is_complete(each)]
    if name not in possible:
        hint = did_you_mean(name, possible)
        raise RecipeError(f"lr_scheduler_type '{name}' is not possible.{hint} Possible: {', '.join(possible)}")
    if name == "constant" and warmup_steps:
        raise RecipeError(
            f"warmup_steps {warmup_steps} does nothing with lr_scheduler_type: constant; set lr_scheduler_type: "
            "constant_with_warmup"
        )


def _is_complete(schedule: SchedulerType) -> bool:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    try:
        get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=1)
    except (TypeError, ValueError):  # some want a smallest rate, or how long they decay
        return False
    return True


def require_effect(modifier: Modifier) -> None:
    """Refuse a field that was changed and does nothing, because of another one.

    Raises:
        RecipeError: It names both.
    """
    for name, needed in DEPENDENT.items():
        if name not in type(modifier).model_fields:
            continue
        default = type(modifier).model_fields[name].get_default(call_default_factory=True)
        if getattr(modifier, name) != default and not getattr(modifier, needed):
            found = getattr(modifier, needed)
            raise RecipeError(
                f"{name} does nothing {'without' if found is None else 'with'} {needed}"
                f"{'' if found is None else f': {str(found).lower()}'}; set that, or leave {name} out"
            )
