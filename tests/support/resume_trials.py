"""Kills a training over and over and lets it go on; prints what became of it. Run by test_resume.py in one process,
which forks: importing torch takes longer than training this model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import TrainingArguments

from amoeba_plugin.data.collator import PaddingCollator  # noqa: F401  # imported before the fork, once
from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.checkpoints import last_complete_checkpoint
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from support.models import random_elastic, tiny_llama

STEPS = 6


def train(directory: Path) -> None:
    """Train to the end, from the last whole checkpoint in a directory if there is one."""
    torch.set_num_threads(1)
    elastic = random_elastic(tiny_llama(attention_dropout=0.1))
    torch.manual_seed(0)
    model = attach_smol(
        elastic, SmolConfig(r=2, num_experts=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    )
    tokens = torch.randint(61, (16, 12), generator=torch.Generator().manual_seed(1)).tolist()
    last = last_complete_checkpoint(directory)
    arguments = TrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=STEPS,
        learning_rate=0.01, per_device_train_batch_size=4, save_strategy="steps", save_steps=1,
        save_total_limit=2, logging_steps=100, dataloader_pin_memory=False,
        resume_from_checkpoint=None if last is None else str(last),
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    train_one_for_all(elastic, model, rows, OneForAllOptions(num_random=1), arguments)


def fork(directory: Path) -> int:
    """Train in a child process; return its id."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        train(directory)
    except BaseException:  # noqa: BLE001  # a forked child never returns to its parent's code
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def finish(directory: Path) -> str:
    """Train to the end; return the digest of the final adapter."""
    assert os.waitpid(fork(directory), 0)[1] == 0
    return hashlib.sha256((directory / f"checkpoint-{STEPS}/adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Print one JSON object: the digest of the uninterrupted run, and a line for each trial."""
    root, wanted = Path(sys.argv[1]), int(sys.argv[2])
    started = time.perf_counter()
    expected = finish(root / "whole")
    seconds = time.perf_counter() - started
    draw, trials = random.Random(0), []
    for attempt in range(4 * wanted):
        directory = root / str(attempt)
        child = fork(directory)
        time.sleep(draw.uniform(0.2, 1) * seconds)
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            continue  # it was done before
        last = last_complete_checkpoint(directory)
        begun = {int(path.name.rpartition("-")[2]) for path in directory.glob("checkpoint-*")}
        step = 0 if last is None else int(last.name.rpartition("-")[2])
        trials.append({"step": step, "interrupted save": max(begun, default=0) > step, "digest": finish(directory)})
        if len(trials) == wanted:
            break
    print(json.dumps({"expected": expected, "trials": trials}))


if __name__ == "__main__":
    main()
