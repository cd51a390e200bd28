"""Layer tuning against full tuning, LoRA and LISA: seconds and memory of a step, and the held-out loss they end at.

A model is tuned on instructions and their responses, packed into rows of 512 tokens, in the same precision by every
way; each way gets the best of three learning rates by the loss on rows of its own, and the losses shown are of rows
that nothing was chosen on. Every training runs in a process of its own: its peak of resident memory is that way's, and
what is beyond the weights is that above the loaded model. Exits vote with weights fitted on the rows that learning
rates are chosen on. Finished trainings are kept in ``--results``; a run that was stopped goes on::

    AMOEBA_TEST_MODEL=SMOLLM2 AMOEBA_TEST_ASSETS=ASSETS python tests/benchmarks/layer_tuning.py --steps 60

The floor beside each is of products of matrices: 2 operations per weight and token forward, 2 for the gradient of what
comes in, 2 for that of the weight.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.data.multiple_choice import QuestionColumns, load_questions
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.peak_memory import resident_memory, resident_peak, restart_resident_peak
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.trainer import AdaptiveLayerTuningTrainer
from amoeba_plugin.training.layer_tuning.voting import Votes
from amoeba_plugin.training.layer_tuning.voting_model import VotingModel, logits_of_exits
from amoeba_plugin.training.layer_tuning.windows import windows_below

ASSETS = Path(os.environ.get("AMOEBA_TEST_ASSETS", "."))
LENGTH, CHOSEN_ON, HELD_OUT = 512, 16, 48  # tokens of a row; rows that learning rates are chosen on; that are shown
RATES = (1e-4, 3e-4, 1e-3)  # of LoRA; full parameters: a tenth of them
EXITS = (8, 16, 23, 30)


@dataclass(frozen=True)
class Way:
    """How a model is tuned.

    Attributes:
        kind: "full", "lora", "lisa", or "window" and "window lora".
        rates: That AdamW's learning rate is chosen from.
        checkpointing: Recompute activations.
        exits: Depths.
        stacked: Layers below those of an exit compute as tuned, not as the base.
        options: Of layer tuning.
    """

    kind: str
    rates: tuple[float, ...] = RATES
    checkpointing: bool = False
    exits: tuple[int, ...] = EXITS
    stacked: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


FULL_RATES = tuple(rate / 10 for rate in RATES)
SEQUENTIAL, CACHED = {"policy": "sequential"}, {"cache_gib": 4.0}
WAYS: Mapping[str, Way] = {
    "full parameters": Way("full", FULL_RATES),
    "LoRA": Way("lora"),
    "LoRA, checkpointing": Way("lora", checkpointing=True),
    "LISA, 2 layers": Way("lisa", FULL_RATES),
    "windows, LoRA": Way("window lora"),
    "windows, LoRA, cached": Way("window lora", options=CACHED),
    "halves, LoRA, cached": Way("window lora", exits=(15, 30), options=CACHED),
    "windows, LoRA, stacked": Way("window lora", stacked=True),
    "windows, LoRA, stacked, sequential, cached": Way("window lora", stacked=True, options=SEQUENTIAL | CACHED),
    "top 8 layers, LoRA, cached": Way("window lora", exits=(30,), options={"window": 8} | CACHED),
    "top 15 layers, LoRA, cached": Way("window lora", exits=(30,), options={"window": 15} | CACHED),
    "top 15 layers, LoRA, cached, checkpointing": Way(
        "window lora", checkpointing=True, exits=(30,), options={"window": 15} | CACHED
    ),
    "top 15 layers, full parameters, cached": Way("window", FULL_RATES, exits=(30,), options={"window": 15} | CACHED),
    "windows, full parameters, stacked, sequential": Way(
        "window", FULL_RATES, stacked=True, options=SEQUENTIAL | {"keep_states": False}
    ),
}


def main() -> None:
    """Measure what is not known yet and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help="rows per step, one per micro-batch")
    parser.add_argument("--rows", type=int, default=320, help="to train on, of 512 tokens; fewer are seen more often")
    parser.add_argument("--questions", type=int, default=300, help="of each set")
    parser.add_argument("--ways", nargs="+", help="parts of names: only these")
    parser.add_argument("--results", type=Path, default=Path("layer_tuning.json"))
    parser.add_argument("--child", nargs=3, metavar=("WAY", "RATE", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        way, rate, out = asked.child
        Path(out).write_text(json.dumps(tuned(WAYS[way], float(rate), asked)))
        return
    known = json.loads(asked.results.read_bytes()) if asked.results.is_file() else {}
    print(f"| way | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    first = None
    for name, way in WAYS.items():
        if asked.ways and not any(part in name for part in asked.ways):
            continue
        found = []
        for rate in way.rates:
            key = f"{name}/{rate:g}/{asked.steps}/{asked.batch}/{asked.rows}/{asked.questions}"
            if key not in known:
                known[key] = in_a_process(name, rate, asked)
                write_atomically(asked.results, json.dumps(known, indent=1).encode())
            found.append(known[key])
        best = min(range(len(found)), key=lambda number: found[number]["chosen_on"])
        first = first or found[best]
        print(f"| {name} | {' | '.join(cells(found[best], first, way.rates[best]))} |", flush=True)


COLUMNS = (
    "learning rate", "held-out loss", "of the exits", "voted", "arc_easy", "piqa", "CPU s per step",
    "against the first", "floor", "MB beyond the weights", "against the first", "MB in all",
)  # fmt: skip


def cells(row: Mapping[str, Any], first: Mapping[str, Any], rate: float) -> list[str]:
    """Return a row of the table."""
    exits = ", ".join(f"{depth}: {loss:.3f}" for depth, loss in row["exits"].items())
    return [
        f"{rate:g}", f"{row['loss']:.3f}", exits, f"{row['voted']:.3f}" if row["voted"] else "",
        *(f"{100 * row['questions'].get(name, math.nan):.1f}" for name in ("arc_easy", "piqa")),
        f"{row['seconds']:.2f}", f"{first['seconds'] / row['seconds']:.2f}x", f"{first['floor'] / row['floor']:.2f}x",
        f"{row['beyond'] / 1e6:.0f}", f"{first['beyond'] / row['beyond']:.2f}x", f"{row['peak'] / 1e6:.0f}",
    ]  # fmt: skip


def in_a_process(way: str, rate: float, asked: argparse.Namespace) -> dict[str, Any]:
    """Train in a process of its own and return what it measured."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        how = [f"--{name}={getattr(asked, name)}" for name in ("steps", "batch", "rows", "questions")]
        command = [sys.executable, __file__, *how, "--child", way, str(rate), str(out)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return json.loads(out.read_bytes())


def rows() -> tuple[list[dict[str, list[int]]], ...]:
    """Return rows to train on, to choose on and to show, of which only responses are learned."""
    tokenizer = AutoTokenizer.from_pretrained(os.environ["AMOEBA_TEST_MODEL"])
    lines = (ASSETS / "text" / "dolly_hhrlhf_small.jsonl").read_text("utf-8").splitlines()
    tokens: list[int] = []
    labels: list[int] = []
    for pair in map(json.loads, lines):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        response = [*tokenizer(pair["response"])["input_ids"], tokenizer.eos_token_id]
        tokens += prompt + response
        labels += [-100] * len(prompt) + response
    cut = [
        {"input_ids": tokens[start : start + LENGTH], "labels": labels[start : start + LENGTH]}
        for start in range(0, len(tokens) - LENGTH + 1, LENGTH)
    ]
    return cut[: -CHOSEN_ON - HELD_OUT], cut[-CHOSEN_ON - HELD_OUT : -HELD_OUT], cut[-HELD_OUT:]


class CpuSeconds(TrainerCallback):
    """Notes the CPU seconds of every step, and the peak of memory over all of them."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begun = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.process_time() - self._begun)


class Lisa(TrainerCallback):
    """Trains embeddings, head and some layers at a time, drawn anew every few steps (LISA, arXiv:2403.17919)."""

    def __init__(self, layers: Sequence[nn.Module], count: int = 2, every: int = 5) -> None:
        self.layers, self.count, self.every = layers, count, every

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        drawn = random.Random(state.global_step).sample(range(len(self.layers)), self.count)
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(number in drawn)
            if number not in drawn:
                for parameter in layer.parameters():
                    parameter.grad = None
                    kwargs["optimizer"].state.pop(parameter, None)


def tuned(way: Way, rate: float, asked: argparse.Namespace) -> dict[str, Any]:
    """Tune a model and measure it."""
    train, chosen_on, held_out = rows()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(os.environ["AMOEBA_TEST_MODEL"], dtype=torch.float32)
    weights = resident_memory()
    exits, trainer = trainer_of(way, model, train[: asked.rows], arguments_of(way, rate, asked.steps, asked.batch))
    noted = CpuSeconds()
    trainer.add_callback(noted)
    restart_resident_peak()
    trainer.train()
    peak = resident_peak()
    found = losses(trainer, exits, chosen_on, held_out)
    return found | {
        "questions": questions(model, asked.questions), "seconds": sum(noted.steps[1:]) / (len(noted.steps) - 1),
        "floor": floor(way, model), "beyond": peak - weights, "peak": peak,
    }  # fmt: skip


def arguments_of(way: Way, rate: float, steps: int, batch: int) -> TrainingArguments:
    """Return the same arguments for every way, but for the learning rate."""
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=batch, per_device_eval_batch_size=1, learning_rate=rate, weight_decay=0.0,
        lr_scheduler_type="constant_with_warmup", warmup_steps=steps // 20, bf16=True, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=steps, dataloader_pin_memory=False, seed=1,
        gradient_checkpointing=way.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if way.checkpointing else None,
    )  # fmt: skip


def trainer_of(
    way: Way, model: PreTrainedModel, train: list[Any], arguments: TrainingArguments
) -> tuple[Exits | None, Trainer]:
    """Return what trains a model in a way."""
    common = {"args": arguments, "train_dataset": train, "data_collator": PaddingCollator()}
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if not way.kind.startswith("window"):
        if way.kind == "lora":
            return None, Trainer(get_peft_model(model, LoraConfig(**lora)), **common)
        trainer = Trainer(model, **common)
        if way.kind == "lisa":
            trainer.add_callback(Lisa(model.model.layers))
        return None, trainer
    exits = Exits(model, way.exits, way.stacked)
    tuned_model: Any = model
    if way.kind == "window lora":
        tuned_model = get_peft_model(model, LoraConfig(**lora, modules_to_save=exits.modules_to_save or None))
    return exits, AdaptiveLayerTuningTrainer(tuned_model, exits, LayerTuningOptions(**way.options), **common)


def losses(trainer: Trainer, exits: Exits | None, chosen_on: list[Any], held_out: list[Any]) -> dict[str, Any]:
    """Return the loss per response token of the whole model, of every exit, and of their vote."""
    model = trainer.model.eval()
    whole = exits or Exits(model.get_base_model() if isinstance(model, PeftModel) else model, [EXITS[-1]])
    fitted_on = [PaddingCollator()([row]) for row in chosen_on]
    with torch.autocast("cpu", torch.bfloat16):
        votes = VotingModel.fitted(model, whole, fitted_on).votes
        chosen, chosen_vote = _per_token(model, whole, votes, chosen_on)
        found, vote = _per_token(model, whole, votes, held_out)
    several = len(whole.depths) > 1
    return {
        "chosen_on": min(chosen_vote, *chosen) if several else chosen[-1], "loss": found[-1],
        "exits": dict(zip(whole.depths, found, strict=True)) if several else {},
        "voted": vote if several else None, "votes": votes.model_dump(),
    }  # fmt: skip


def _per_token(model: Any, exits: Exits, votes: Votes, data: list[Any]) -> tuple[list[float], float]:
    """Return the loss of every exit, and of their vote."""
    totals, voted, count = torch.zeros(len(exits.depths)), 0.0, 0
    for row in data:
        if max(row["labels"][1:]) < 0:  # all of it is a prompt
            continue
        logits, labels = logits_of_exits(model, exits, [PaddingCollator()([row])], LENGTH)
        totals += torch.stack([functional.cross_entropy(each, labels, reduction="sum") for each in logits])
        voted -= votes.combined(logits).gather(-1, labels[:, None]).sum().item()
        count += len(labels)
    return (totals / count).tolist(), voted / count


def questions(model: PreTrainedModel, asked: int) -> dict[str, float]:
    """Return the share of so many questions of each set that the whole model answers right."""
    tokenizer = AutoTokenizer.from_pretrained(os.environ["AMOEBA_TEST_MODEL"])
    found = {}
    for name in ("arc_easy", "piqa") if asked else ():
        path = str(ASSETS / "eval" / f"{name}.jsonl")
        batches = load_questions(
            path, tokenizer, split="train", num_questions=asked, vocab_size=tokenizer.vocab_size, seed=0,
            columns=QuestionColumns("query", "choices", "gold"), letters=False,
        )  # fmt: skip
        accuracy = MultipleChoiceAccuracy()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen = torch.cat([accuracy.observe(model.eval(), batch) for batch in batches])
        found[name] = accuracy.score(seen).value
    return found


def floor(way: Way, model: PreTrainedModel) -> float:
    """Return operations of products of matrices per token of a step."""
    layers = sum(value.numel() for value in model.model.layers[0].parameters() if value.dim() == 2)
    head, depth = model.get_output_embeddings().weight.numel(), model.config.num_hidden_layers
    whole = 2 * (depth * layers + head)
    if way.kind == "full":
        return 3.0 * whole
    if way.kind == "lora":
        return (3.0 if way.checkpointing else 2.0) * whole
    if way.kind == "lisa":
        return 2.0 * whole + 2 * (2 * layers + head)
    total = 0.0
    for window_of in windows_below(way.exits, way.options.get("window"), apart=not way.stacked):
        exit_depth, window = window_of.depth, window_of.depth - window_of.first
        bottom = 0 if way.options.get("cache_gib") else exit_depth - window
        total += 2 * (bottom * layers + (2 if way.kind == "window lora" else 3) * window * layers + 2 * head)
    return total / len(way.exits)


if __name__ == "__main__":
    main()
