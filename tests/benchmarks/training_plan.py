"""Plans of layer tuning against what they take: peak memory, CPU time, and whether a cap is ever exceeded.

Every cap is drawn at random from a range, and each is planned and trained in a process of its own. Prints a line for
each, and the worst and the mean of all::

    python tests/benchmarks/training_plan.py --caps 50
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import amoeba_plugin
from amoeba_plugin.demo.corpus import part_files, token_blocks
from amoeba_plugin.errors import BudgetError
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.probing import plan_training
from amoeba_plugin.training.layer_tuning.tune import tune_layers

DEMO = str(Path(amoeba_plugin.__file__).parent / "demo" / "model")
MB = 10**6


def main() -> None:
    """Plan and train within random caps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--caps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--range", type=float, nargs=2, default=(500, 1200), metavar=("LEAST", "MOST"), help="MB")
    parser.add_argument("--child", nargs=2, metavar=("CAP", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        Path(asked.child[1]).write_text(json.dumps(trained(asked.model, float(asked.child[0]), asked.steps)))
        return
    draw, rows = random.Random(0), []
    for _ in range(asked.caps):
        cap = draw.uniform(*asked.range) * MB
        row = in_a_process(asked, cap)
        rows.append(row)
        print(f"cap {cap / MB:.0f} MB: {told(row)}", flush=True)
    done = [row for row in rows if row["took"]]
    for name in ("memory", "cpu_seconds"):
        apart = [row[name] / row["took"][name] - 1 for row in done]
        mean = sum(map(abs, apart)) / len(apart)
        print(f"{name}: predicted {min(apart):+.1%} to {max(apart):+.1%} of what was taken, {mean:.1%} in the mean")
    exceeded = sum(row["took"]["memory"] > row["cap"] for row in done)
    print(f"{exceeded} of {len(done)} caps exceeded, {len(rows) - len(done)} refused")


def told(row: dict[str, Any]) -> str:
    """Return what became of a cap."""
    if not row["took"]:
        return f"refused, {row['why']}"
    took = row["took"]
    return (
        f"{row['plan']}; memory {row['memory'] / MB:.0f} MB planned, {took['memory'] / MB:.0f} taken; "
        f"{row['cpu_seconds']:.1f} CPU s planned, {took['cpu_seconds']:.1f} taken"
    )


def in_a_process(asked: argparse.Namespace, cap: float) -> dict[str, Any]:
    """Plan and train in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        how = ["--model", asked.model, "--steps", str(asked.steps), "--child", str(cap), str(out)]
        subprocess.run([sys.executable, __file__, *how], check=True, stdout=sys.stderr)
        return json.loads(out.read_bytes())


def trained(path: str, cap: float, steps: int) -> dict[str, Any]:
    """Plan within a cap and train."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = token_blocks(part_files("train"), tokenizer, block_size=256, limit=64)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in text]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    exits = Exits(model, [model.config.num_hidden_layers // 2, model.config.num_hidden_layers])
    lora = LoraConfig(r=16, target_modules="all-linear", modules_to_save=exits.modules_to_save)
    tuned = get_peft_model(model, lora)
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=16,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=steps,
        dataloader_pin_memory=False,
    )  # fmt: skip
    options = LayerTuningOptions()
    try:
        planned = plan_training(tuned, exits, rows, options, arguments, memory=cap)
    except BudgetError as error:
        return {"cap": cap, "took": {}, "why": str(error)}
    done = planned.run(partial(tune_layers, tuned, exits, rows), options, arguments)
    return done.model_dump() | {"cap": cap, "plan": done.plan.in_words}


if __name__ == "__main__":
    main()
