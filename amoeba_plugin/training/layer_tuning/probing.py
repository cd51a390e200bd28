"""Steps of layer tuning, measured on this machine before a training, which leave no trace in the model."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from pydantic import Field
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from amoeba_plugin.errors import BudgetError, TrainingError
from amoeba_plugin.runtime.documents import Document
from amoeba_plugin.runtime.dtypes import has_instructions
from amoeba_plugin.runtime.peak_memory import (
    give_back_memory,
    peak_memory,
    reset_peak_memory,
    resident_memory,
    resident_peak,
    restart_resident_peak,
)
from amoeba_plugin.training.as_found import as_found
from amoeba_plugin.training.layer_tuning.candidates import candidates_of
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.planner import CostModel, Job, Plan, Probe, choose, fitting, probes_of
from amoeba_plugin.training.layer_tuning.trainer import AdaptiveLayerTuningTrainer
from amoeba_plugin.training.layer_tuning.windows import Window, windows_below

logger = logging.getLogger(__name__)
PLAN_NAME, GIB, CACHE_SLACK = "plan.json", 2**30, 1.05
STEPS = 3  # of a probe; the first makes the optimizer's states and is not timed


class Planned(Document):
    """A plan with what it was predicted to take, and, once it has run, what it took; a file.

    Attributes:
        cache_gib: For states that are kept.
        seconds: Predicted.
        cpu_seconds: Predicted, of the CPU.
        memory: Bytes of the process at most, predicted.
        took: What was measured, by the same names; empty before it has run.
    """

    what: ClassVar[str] = "a plan of a training"

    micro_batch: int
    accumulation: int
    window: int | None
    checkpointing: bool
    half: bool
    cached: bool
    cache_gib: float
    seconds: float
    cpu_seconds: float
    memory: float
    took: dict[str, float] = Field(default_factory=dict)

    @classmethod
    def kept_in(cls, directory: Path) -> Planned | None:
        """Return the plan of a training that was begun in a directory; ``None``: there is none."""
        return cls.load(directory / PLAN_NAME) if (directory / PLAN_NAME).is_file() else None

    @property
    def plan(self) -> Plan:
        """The plan."""
        return Plan(self.micro_batch, self.accumulation, self.window, self.checkpointing, self.half, self.cached)

    @property
    def in_words(self) -> str:
        """What it is and takes, in a sentence."""
        return (
            f"{self.plan.in_words}; {self.seconds:.0f} s ({self.cpu_seconds:.0f} s of the CPU) and "
            f"{self.memory / GIB:.2f} GiB of the process"
        )

    def applied(
        self, options: LayerTuningOptions, arguments: TrainingArguments
    ) -> tuple[LayerTuningOptions, TrainingArguments]:
        """Return options and arguments of a training as it was planned."""
        planned = copy.copy(arguments)
        planned.per_device_train_batch_size = self.micro_batch
        planned.gradient_accumulation_steps = self.accumulation
        planned.gradient_checkpointing = self.checkpointing
        planned.gradient_checkpointing_kwargs = {"use_reentrant": False} if self.checkpointing else None
        how = replace(
            options, window=self.window or options.window, bottom_dtype="bfloat16" if self.half else "same",
            cache_gib=self.cache_gib, cache_dir=options.cache_dir if self.cached else None,
        )  # fmt: skip
        return how, planned

    def run(
        self,
        train: Callable[[LayerTuningOptions, TrainingArguments], Any],
        options: LayerTuningOptions,
        arguments: TrainingArguments,
    ) -> Planned:
        """Train as planned, and return the plan with what it took."""
        restart_resident_peak()
        reset_peak_memory()
        wall, cpu = time.perf_counter(), time.process_time()
        train(*self.applied(options, arguments))
        took = {
            "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu,
            "memory": float(peak_memory().get("accelerator", resident_peak())),
        }  # fmt: skip
        for name, unit, scale in (("seconds", "s", 1), ("cpu_seconds", "s of the CPU", 1), ("memory", "GiB", GIB)):
            logger.info("planned %.2f %s, took %.2f", getattr(self, name) / scale, unit, took[name] / scale)
        return self.model_copy(update={"took": took})


def plan_training(
    model: PreTrainedModel | PeftModel,
    exits: Exits,
    rows: Sequence[Any],
    options: LayerTuningOptions,
    arguments: TrainingArguments,
    memory: float | None = None,
    deadline: float | None = None,
) -> Planned:
    """Measure some steps and choose how a training runs; the model is as it was afterwards.

    Args:
        model: What will be trained.
        exits: Of it.
        rows: To train on.
        options: Of the training; what a plan chooses is not looked at.
        arguments: Of the training: steps, and sequences of a step.
        memory: Bytes of the process, at most.
        deadline: Seconds, at most.

    Raises:
        BudgetError: If no plan keeps the limits.
        TrainingError: If there are several processes, each of which would plan something else.
    """
    if arguments.world_size > 1:
        raise TrainingError(
            "memory and deadline plan the training of one process; leave them out where there are several"
        )
    job = job_of(model, exits, rows, options, arguments)
    longest = sorted(rows, key=lambda row: -len(row["input_ids"]))
    probes: list[Probe] = []
    give_back_memory()
    before = float(torch.accelerator.memory_allocated() if torch.accelerator.is_available() else resident_memory())
    if memory is not None and before > memory:
        raise BudgetError(
            f"no plan trains within {memory / GIB:.2f} GiB: the process takes {before / GIB:.2f} GiB with the model "
            "alone"
        )
    for plan, window in tqdm(probes_of(job), desc="planning", unit="probe", leave=False):
        if memory is not None:
            plan, window = fitting(probes, plan, window, memory, before)
        if all((plan, window) != (probe.plan, probe.window) for probe in probes):
            probes.append(measured(model, exits, longest, plan, window, options, arguments))
    give_back_memory()
    plan, costs = choose(CostModel.of(probes), job, memory, deadline)
    return Planned(**vars(plan), cache_gib=CACHE_SLACK * job.cache_bytes / GIB if plan.cached else 0.0,
                   seconds=costs.seconds, cpu_seconds=costs.cpu_seconds, memory=costs.memory)  # fmt: skip


def job_of(
    model: PreTrainedModel | PeftModel,
    exits: Exits,
    rows: Sequence[Any],
    options: LayerTuningOptions,
    arguments: TrainingArguments,
) -> Job:
    """Return what is to be trained, as a planner sees it."""
    with as_found(exits.model, model.modules()):
        candidates = candidates_of(model, exits, windows_below(exits.depths))
        trained = sum(value.numel() for of in candidates.of_layers.values() for value in of)
    lengths = [len(row["input_ids"]) for row in rows]
    return Job(
        depths=exits.depths,
        steps=arguments.max_steps,
        sequences=arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
        rows=len(rows),
        length=max(lengths),
        mean_length=sum(lengths) / len(lengths),
        layer_parameters=round(trained / len(candidates.of_layers)),
        state_bytes=exits.model.config.hidden_size * exits.model.dtype.itemsize,
        weights=options.weights,
        window=options.window,
        apart=not exits.stacked,
        keep_states=options.keep_states,
        bottoms=1 if exits.stacked else max(1, len(exits.depths) - 1),
        may_cache=options.policy == "sequential" or not exits.stacked or len(exits.depths) == 1,
        may_half=exits.model.dtype == torch.float32 and has_instructions(torch.bfloat16),
    )


def measured(
    model: PreTrainedModel | PeftModel,
    exits: Exits,
    rows: Sequence[Any],
    plan: Plan,
    window: Window,
    options: LayerTuningOptions,
    arguments: TrainingArguments,
) -> Probe:
    """Run a few steps of one window at learning rate 0, and measure one."""
    probe_arguments = copy.copy(arguments)
    for name, value in {
        "max_steps": STEPS, "learning_rate": 0.0, "weight_decay": 0.0, "save_strategy": "no", "eval_strategy": "no",
        "per_device_train_batch_size": plan.micro_batch, "gradient_accumulation_steps": plan.accumulation,
        "logging_steps": 10 * STEPS, "disable_tqdm": True, "resume_from_checkpoint": None,
        "gradient_checkpointing": plan.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if plan.checkpointing else None,
    }.items():  # fmt: skip
        setattr(probe_arguments, name, value)
    how = replace(options, window=window.depth - window.first, weights=(), cache_gib=0.0, cache_dir=None,
                  bottom_dtype="bfloat16" if plan.half else "same")  # fmt: skip
    needed = plan.micro_batch * plan.accumulation * STEPS
    data = [rows[number % len(rows)] for number in range(needed)]
    clock = _Clock()
    with as_found(exits.model, model.modules()):
        trainer = _OneWindow(model, exits, how, window, args=probe_arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        give_back_memory()
        restart_resident_peak()
        reset_peak_memory()
        trainer.train()
        memory = peak_memory().get("accelerator", resident_peak())
    return Probe(plan, window, min(clock.seconds[1:]), min(clock.cpu_seconds[1:]), memory)


class _OneWindow(AdaptiveLayerTuningTrainer):
    """Trains one window at every step."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        exits: Exits,
        options: LayerTuningOptions,
        window: Window,
        **trainer_kwargs: Any,
    ) -> None:
        self._only = window
        super().__init__(model, exits, options, **trainer_kwargs)

    def window_at(self, step: int) -> Window:
        return self._only


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wall, cpu = self._begun
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)
