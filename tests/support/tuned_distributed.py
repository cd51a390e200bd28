"""Tunes layers of a tiny model in this process, which may be one of two by DDP, and writes its parameters."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import TrainingArguments

from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.trainer import AdaptiveLayerTuningTrainer
from support.batches import make_rows
from support.models import tiny_llama

GLOBAL_BATCH = 4


def tune(output: Path, kind: str) -> None:
    """Train "none" or "lora", five steps of four rows."""
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    exits = Exits(tiny_llama(), [1, 3, 4], stacked=kind == "none")
    torch.manual_seed(0)
    model = exits.model
    if kind == "lora":
        targets = ["q_proj", "down_proj"]
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=exits.modules_to_save)
        model = get_peft_model(exits.model, config)
    arguments = TrainingArguments(
        output_dir=str(output.parent / "training"), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=5,
        learning_rate=0.01, per_device_train_batch_size=GLOBAL_BATCH // processes, save_strategy="no",
        per_device_eval_batch_size=2, gradient_accumulation_steps=2, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = make_rows(48, targets=[1 + number % 9 for number in range(48)])
    trainer = AdaptiveLayerTuningTrainer(model, exits, LayerTuningOptions(), args=arguments, train_dataset=rows)
    trainer.train()
    metrics = trainer.evaluate(rows[:8])
    found = {name: value.detach().clone() for name, value in model.named_parameters()}
    found["evaluated"] = torch.tensor([metrics[f"eval_loss_exit_{depth}"] for depth in exits.depths])
    save_file(found, f"{output}-{kind}-{os.environ.get('RANK', 'one')}.safetensors")


if __name__ == "__main__":
    for each in ("none", "lora"):
        tune(Path(sys.argv[1]), each)
