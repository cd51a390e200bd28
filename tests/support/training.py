"""Short trainings, the same at every call, and their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.models.adapter import linear_names
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.batches import make_rows
from support.models import random_elastic, random_tokens, tiny_llama

PAPER = OneForAllOptions(sampled_shapes="independent")


def make_arguments(directory: Path, **fields: Any) -> TrainingArguments:
    """Return arguments of a training that is silent, on the CPU, without momentum unless asked for."""
    defaults = {
        "output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "logging_steps": 1,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**defaults | fields)


def make_elastic(seed: int = 0, **config: Any) -> ElasticModel:
    """Return a four-layer Llama with 4 KV groups, elastic in depth and width."""
    return random_elastic(tiny_llama(seed, **config), seed)


def make_trainer(
    elastic: ElasticModel, directory: Path, options: OneForAllOptions = PAPER, model: nn.Module | None = None,
    rows: list[dict[str, list[int]]] | None = None, **fields: Any,
) -> OneForAllTrainer:  # fmt: skip
    """Return a trainer of the elastic model (all parameters), or of an adapter."""
    return OneForAllTrainer(
        model or elastic.model, elastic, options, args=make_arguments(directory, **fields),
        train_dataset=make_rows() if rows is None else rows, data_collator=PaddingCollator(),
    )  # fmt: skip


def add_smol(elastic: ElasticModel, seed: int = 0, **fields: Any) -> PeftModel:
    """Put on a SMOL adapter that changes outputs from the start."""
    torch.manual_seed(seed)
    return attach_smol(
        elastic, SmolConfig(r=4, num_experts=3, init_weights=False, target_modules="all-linear", **fields)
    )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients that there are, by name."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def attach_adapter(elastic: ElasticModel, kind: str) -> PeftModel:
    """Put a fresh "lora" or "smol" on all linears; the same at every call."""
    torch.manual_seed(1)
    targets = linear_names(elastic.layers)
    if kind == "lora":
        return attach_lora(elastic, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    return attach_smol(elastic, SmolConfig(r=2, num_experts=3, target_modules=targets, task_type="CAUSAL_LM"))


def train_by_large_steps(elastic: ElasticModel, model: nn.Module, directory: Path, steps: int = 3) -> None:
    """Train on two rows, by steps so large that what is wrong in one shows."""
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in random_tokens(60).repeat(2, 1)
    ]
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.5, optim="sgd",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    train_one_for_all(elastic, model, rows, OneForAllOptions(num_random=1), arguments)


def require_equal_training(found: PeftModel, expected: PeftModel, tolerance: float) -> None:
    """Require that two adapters have learned the same, and something."""
    trained, wanted = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (found, expected))
    assert trained.keys() == wanted.keys()
    assert any(bool(value.any()) for name, value in trained.items() if name.endswith((".B", "lora_B.default.weight")))
    for name, value in trained.items():
        torch.testing.assert_close(value, wanted[name], atol=tolerance, rtol=0)
