"""Trains a tiny model in one process, and in two by DDP and by FSDP2 on the same rows; writes what came of it. Run by
test_distributed.py in one process, which forks: importing torch takes longer than training this model.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from llmcompressor import oneshot
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

import amoeba_plugin  # noqa: F401  # registers the modifiers
from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.checkpoint import attach_smol, save_elastic
from amoeba_plugin.elastic.lora import attach_lora
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import TrainingError
from amoeba_plugin.runtime.fsdp import all_finite
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.batches import make_rows
from support.models import random_elastic, save_base, tiny_llama
from support.sublayers import TABLE, elastic_of

STEPS, GLOBAL_BATCH = 5, 4
SUBLAYERS = {depth: kept for depth, kept in TABLE.items() if depth != "1"}
SHAPE = "2x1/2"  # the smallest


@dataclass
class Case:
    """One training: what is trained, and how."""

    adapter: str = "smol"
    smol: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 48
    sublayers: bool = False


EACH_SUBNET = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
CASES = {
    "smol": Case(smol={"router_load_balancing": 0.5}),
    "teacher": Case(
        smol={"adapt_largest": False},
        options={"train_largest": False},
        arguments={"gradient_accumulation_steps": 2},
    ),
    "all tokens": Case(
        "none",
        options={"distill_all_tokens": True, "kd_weight": 0.7},
        arguments={"gradient_accumulation_steps": 2},
    ),
    "none": Case("none"),
    "lora": Case("lora", arguments={"gradient_checkpointing": True}),
    "each": Case("none", arguments={"accelerator_config": EACH_SUBNET}),
    "sublayers": Case(sublayers=True),
    "sublayers, all": Case("none", sublayers=True),
}
MODES = {
    "one": list(CASES),
    "ddp": ["smol", "teacher", "all tokens", "none", "sublayers"],
    "fsdp": list(CASES),
    "fsdp alone": [],
}
UNEVEN = Case(rows=7)  # 3 and 4 for each process
# One row at a time, many of them without a target: the last micro-batch of a step, too.
IDLE = Case("none", arguments={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
ALONE = ("one", "fsdp alone")
RECIPE = {
    "adapter": {"r": 2, "num_experts": 3}, "max_steps": STEPS, "gradient_accumulation_steps": 2, "save_steps": 2,
    "learning_rate": 0.01,
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "version 1": {"version": 1, "sync_module_states": False},
    "activation checkpointing": {"activation_checkpointing": True},
    "layers together": {"auto_wrap_policy": "NO_WRAP"},
}


class CountExchanges(TrainerCallback):
    """Counts how often gradients are exchanged, by what exchanges them: DDP's last bucket comes once each time."""

    def __init__(self) -> None:
        self.trainer: OneForAllTrainer | None = None
        self.counts: Counter[str] = Counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, self._exchange)
        for name, module in wrapped.named_modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(lambda _gradients, name=name: self.counts.update([name]))

    def _exchange(self, state, bucket):  # noqa: ANN001  # DDP refuses annotations that are strings
        self.counts["ddp"] += bucket.is_last()
        return allreduce_hook(None, bucket)


def offer_gloo() -> None:
    """Let accelerate shard on a CPU: it offers FSDP to accelerators only, though torch has it for both."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def make_model(elastic: ElasticModel, case: Case) -> nn.Module:
    """Put the adapter on."""
    torch.manual_seed(0)
    if case.adapter == "none":
        return elastic.model
    if case.adapter == "lora":
        config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        return attach_lora(elastic, config)
    fields = {"r": 2, "num_experts": 3, "init_weights": False, "target_modules": "all-linear"}
    return attach_smol(elastic, SmolConfig(**fields | case.smol))


def uneven_rows() -> list[dict[str, list[int]]]:
    """Return rows that differ in how many targets they have; many have none, so that at times a process has none."""
    targets = torch.randint(-8, 12, (48,), generator=torch.Generator().manual_seed(2)).clamp(min=0).tolist()
    return make_rows(48, targets, seed=1)


def make_arguments(directory: Path, mode: str, **fields: Any) -> TrainingArguments:
    """Silent, the same global batch however many processes there are."""
    processes = 1 if mode in ALONE else 2
    arguments = {
        "output_dir": str(directory / mode), "report_to": "none", "disable_tqdm": True, "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // processes, "save_strategy": "no", "logging_steps": STEPS,
        "optim": "sgd", "dataloader_pin_memory": False, "learning_rate": 0.05, "max_grad_norm": 1.0,
        "use_cpu": not mode.startswith("fsdp"), "ddp_backend": "gloo" if processes > 1 else None,
        "fsdp": True if mode.startswith("fsdp") else None,
    }  # fmt: skip
    return TrainingArguments(**arguments | fields)


def make_trainer(directory: Path, case: Case, mode: str, **fields: Any) -> OneForAllTrainer:
    """Return a trainer of a fresh model."""
    elastic = elastic_of(tiny_llama(), SUBLAYERS) if case.sublayers else random_elastic(tiny_llama(), repaired=True)
    arguments = make_arguments(directory, mode, **case.arguments | fields)
    return OneForAllTrainer(
        make_model(elastic, case), elastic, OneForAllOptions(**case.options), args=arguments,
        train_dataset=uneven_rows()[: case.rows],
        eval_dataset=uneven_rows()[:6], eval_shapes="all", data_collator=PaddingCollator(),
    )  # fmt: skip


def whole(value: Tensor) -> Tensor:
    """Return a parameter as one process has it."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def trained(trainer: OneForAllTrainer) -> dict[str, Tensor]:
    """Return what was trained."""
    return {name: whole(value) for name, value in trainer.model.named_parameters() if value.requires_grad}


def train(directory: Path, name: str, mode: str, case: Case) -> None:
    """Train in this process, which may be one of several; each saves what it has."""
    counter = CountExchanges()
    trainer = make_trainer(directory, case, mode)
    trainer.add_callback(counter)
    counter.trainer = trainer
    trainer.train()
    found = trained(trainer)
    log = next(entry for entry in trainer.state.log_history if f"loss/{SHAPE}" in entry)
    numbers = [log[key] for key in ("loss", f"loss/{SHAPE}", f"balance/{SHAPE}")]
    numbers += [log.get(f"router/{SHAPE}/entropy", 0.0)]
    counts = counter.counts.values()
    found |= {
        "exchanges": torch.tensor([min(counts, default=0), max(counts, default=0)]),
        "logged": torch.tensor(numbers),
        "evaluated": torch.tensor([trainer.evaluate()[f"eval_loss_{shape}"] for shape in trainer.elastic.space]),
    }
    peft_model = None if case.adapter == "none" else trainer.model
    save_elastic(
        trainer.elastic, peft_model, directory / f"{name}-{mode}", str(directory / "base"), case.adapter == "none"
    )
    save_file(found, directory / f"{name}-{mode}-{os.environ.get('RANK', 0)}.safetensors")


def run_recipe(directory: Path, mode: str) -> None:
    """Train by a recipe, with checkpoints."""
    if mode == "ddp":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in uneven_rows()]
    kept = {"4": [0, 1, 2, 3], "3": [0, 2, 3], "2": [1, 3]}  # nothing is searched
    select = {"DepthShrinkingModifier": {"min_depth": 2, "kept_layers": kept}}
    where = {"elastic_dir": str(directory / f"recipe-{mode}"), "checkpoint_dir": str(directory / f"checkpoints-{mode}")}
    train = {"OneForAllDistillationModifier": RECIPE | where | {"batch_size": 4 if mode == "one" else 2}}
    recipe = {"a_stage": {"a_modifiers": select}, "b_stage": {"b_modifiers": train}}
    oneshot(
        model=str(directory / "base"), recipe=yaml.safe_dump(recipe), dataset=DataLoader(rows, batch_size=4),
        precision="float32",
    )  # fmt: skip


def resume(directory: Path, kind: str) -> None:
    """Go on from a checkpoint, to the end that the whole training came to; save the adapter as an ordinary file."""
    fields = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    fields |= {"fsdp_config": {"state_dict_type": kind}, "output_dir": str(directory / kind)}
    uninterrupted = make_trainer(directory, CASES["smol"], "fsdp", **fields)
    uninterrupted.train()
    trainer = make_trainer(directory, CASES["smol"], "fsdp", **fields)
    trainer.train(resume_from_checkpoint=str(directory / kind / "checkpoint-3"))
    expected, found = trained(uninterrupted), trained(trainer)
    equal = all(torch.equal(found[name], value) for name, value in expected.items())
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(directory / kind / "adapter"))
    if os.environ["RANK"] == "0":
        save_file(found | {"equal": torch.tensor(equal)}, directory / f"{kind}.safetensors")


def message_of(action: Callable[..., Any], *arguments: Any) -> str:
    """Return with what words something is refused."""
    try:
        action(*arguments)
    except TrainingError as error:
        return str(error)
    return "nothing was refused"


def refuse(directory: Path) -> None:
    """Ask for what FSDP cannot do here."""

    def with_config(config: dict[str, Any]) -> None:
        make_trainer(directory, CASES["none"], "fsdp", fsdp_config=dict(config)).train()

    def recipe() -> None:
        elastic = random_elastic(tiny_llama())
        train_one_for_all(elastic, elastic.model, uneven_rows(), OneForAllOptions(), make_arguments(directory, "fsdp"))

    messages = {what: message_of(with_config, config) for what, config in REFUSED.items()}
    messages["recipe"] = message_of(recipe)
    mesh = init_device_mesh("cpu", (2,))
    for last in (1.0, math.inf):  # the other process' half of the gradient
        messages[f"gradient {last}"] = all_finite([distribute_tensor(torch.tensor([1.0, last]), mesh)])
    if os.environ["RANK"] == "0":
        (directory / "refused.json").write_text(json.dumps(messages))


def work(directory: Path, mode: str) -> None:
    """Do all of a mode in this process, which may be one of two."""
    torch.set_num_threads(1)
    if mode.startswith("fsdp"):
        offer_gloo()
    if mode == "fsdp":
        refuse(directory)
    for name in MODES[mode]:
        train(directory, name, mode, CASES[name])
    if mode in ALONE:
        train(directory, "idle", mode, IDLE)
    if mode in ("one", "ddp"):
        run_recipe(directory, mode)
    if mode == "ddp":
        train(directory, "uneven", mode, UNEVEN)
    if mode == "fsdp":
        resume(directory, "FULL_STATE_DICT")
        resume(directory, "SHARDED_STATE_DICT")


def fork(environment: dict[str, str], directory: Path, mode: str) -> int:
    """Work in a child process; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= environment
        work(directory, mode)
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
    """Run every mode, in one process or in two."""
    directory = Path(sys.argv[1])
    save_base(tiny_llama(), directory / "base")
    for mode in sys.argv[2:] or MODES:
        number = 1 if mode in ALONE else 2
        shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
        ranks = [{}] if mode == "one" else ranks
        children = [fork(rank, directory, mode) for rank in ranks]
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert not any(codes), f"{mode}: {codes}"


if __name__ == "__main__":
    main()
