"""Short trainings, the same at every call, and their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainingArguments

from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.models.adapter import linear_names
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from support.models import random_tokens


def make_arguments(directory: Path, **fields: Any) -> TrainingArguments:
    """Return arguments of a training that is silent, on the CPU, without momentum unless asked for."""
    defaults = {
        "output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "logging_steps": 1,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**defaults | fields)


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
