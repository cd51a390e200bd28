"""Trains a tiny model in one process and in two on the same rows; writes the parameters. Run by test_distributed.py in
one process, which forks: importing torch takes longer than training this model.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from elastic_models import random_elastic, tiny_llama
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback, TrainingArguments

from amoeba_plugin.batching import PaddingCollator
from amoeba_plugin.checkpoint import attach_smol
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training import OneForAllOptions, OneForAllTrainer

STEPS, GLOBAL_BATCH = 5, 4


class CountExchanges(TrainerCallback):
    """Counts how often DDP exchanges all gradients; its last bucket comes once each time."""

    def __init__(self) -> None:
        self.trainer: OneForAllTrainer | None = None
        self.count = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if state.global_step == 0 and isinstance(self.trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self._exchange)

    def _exchange(self, state, bucket):  # noqa: ANN001  # DDP refuses annotations that are strings
        self.count += bucket.is_last()
        return allreduce_hook(None, bucket)


def train(directory: Path, adapter: str, accumulation: int) -> None:
    """Train in this process, which may be one of several; the first one saves."""
    torch.set_num_threads(1)
    elastic = random_elastic(tiny_llama())
    torch.manual_seed(0)
    smol = SmolConfig(r=2, num_experts=3, init_weights=False, target_modules="all-linear")
    model = attach_smol(elastic, smol) if adapter == "smol" else elastic.model
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // processes, gradient_accumulation_steps=accumulation,
        save_strategy="no", logging_steps=STEPS, optim="sgd", dataloader_pin_memory=False,
        learning_rate=0.05, max_grad_norm=1.0, ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(61, (48, 12), generator=generator).tolist()
    targets = torch.randint(1, 12, (48,), generator=generator).tolist()  # rows differ in how many
    rows = [
        {"input_ids": row, "labels": [-100] * (12 - n) + row[12 - n :]} for row, n in zip(tokens, targets, strict=True)
    ]
    counter = CountExchanges()
    trainer = OneForAllTrainer(
        model, elastic, OneForAllOptions(), args=arguments, train_dataset=rows, data_collator=PaddingCollator(),
        callbacks=[counter],
    )  # fmt: skip
    assert arguments.ddp_find_unused_parameters is None
    counter.trainer = trainer
    trainer.train()
    found = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    log = next(entry for entry in trainer.state.log_history if "loss/2x1/2" in entry)
    found |= {
        "exchanges": torch.tensor(counter.count),
        "logged": torch.tensor([log[name] for name in ("loss", "loss/2x1/2", "balance/2x1/2")]),
    }
    save_file(found, directory / f"{adapter}-{accumulation}-{processes}-{os.environ.get('RANK', 0)}.safetensors")


def fork(directory: Path, adapter: str, accumulation: int, environment: dict[str, str]) -> int:
    """Train in a child process; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= environment
        train(directory, adapter, accumulation)
    except BaseException:  # noqa: BLE001  # a forked child never returns to its parent's code
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def free_port() -> str:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def main() -> None:
    """Run every case in one process, then in two."""
    directory = Path(sys.argv[1])
    for adapter, accumulation in (("smol", 1), ("smol", 2), ("none", 1)):
        for processes in (1, 2):
            port = free_port()
            shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
            children = [fork(directory, adapter, accumulation, rank if processes > 1 else {}) for rank in ranks]
            codes = [os.waitpid(child, 0)[1] for child in children]
            assert not any(codes), f"{adapter}, {processes} processes: {codes}"


if __name__ == "__main__":
    main()
