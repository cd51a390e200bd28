"""What a 4-bit base costs and deviates: training steps of narrow shapes, and subnets cut from either base.

* step: CPU seconds of forward and backward with a SMOL adapter on a Llama with 4 layers of 512 channels, on one thread,
  of every shape against the whole one, for the fp32 base and the one in four bits. All take turns; medians of ratios.
* cut: the demo's model, trained beside its 4-bit weights, and beside its own; held-out loss in nats per token of the
  subnet that is cut from the weights it was trained beside, and from those of the other base.

Wants bitsandbytes, whose products on a CPU unpack the weights each time. fp32. Prints JSON::

    python tests/benchmarks/quantized_base.py step
    python tests/benchmarks/quantized_base.py cut --steps 30
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, TrainingArguments

import amoeba_plugin
from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.demo.corpus import part_files, token_blocks
from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.adapter import group_key, linear_names
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.registry import importance_named, objective_named
from amoeba_plugin.selection.width.ranking import rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.train import train_one_for_all

FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
WIDTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2))
STEP_SHAPES = ("4x1", "4x3/4", "4x1/2", "2x1")
CUT_SHAPES = ("12x3/4", "10x3/4")


def main() -> None:
    """Print the figures of one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("step", "cut"))
    parser.add_argument("--rounds", type=int, default=5, help="of step")
    parser.add_argument("--tokens", type=int, default=512, help="of step")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of cut")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    found = step(settings.rounds, settings.tokens) if settings.part == "step" else cut(settings.steps)
    print(json.dumps(found, indent=1))


def load(path: str, quantized: bool) -> Any:
    """Return a causal LM in fp32 or in four bits."""
    config = {"quantization_config": FOUR} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config)
    for module in model.modules():  # a kernel for CPUs in evaluation that rounds to bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def adapted(elastic: ElasticModel) -> Any:
    """Return the elastic model with SMOL on all its linears."""
    torch.manual_seed(0)
    config = SmolConfig(
        r=16, num_experts=3, combination="factors", adapt_largest=False, target_modules=linear_names(elastic.layers),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return attach_smol(elastic, config)


def step(rounds: int, tokens: int) -> dict[str, Any]:
    """Time training steps of one shape each."""
    llama = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    ids = torch.randint(512, (1, tokens))
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(llama).save_pretrained(directory)
        runs = {
            (name, shape): run
            for name, quantized in (("fp32", False), ("4-bit", True))
            for shape, run in _runs(load(directory, quantized), ids)
        }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key, run in runs.items():
            started = time.process_time()
            run()
            if number:
                seconds[key].append(time.process_time() - started)

    def ratio(one: tuple[str, str], other: tuple[str, str]) -> float:
        pairs = zip(seconds[one], seconds[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        name: {f"{shape} / 4x1": ratio((name, shape), (name, "4x1")) for shape in STEP_SHAPES[1:]}
        | {"4x1 / the same without elastic": ratio((name, "4x1"), (name, "plain"))}
        for name in ("fp32", "4-bit")
    } | {"4-bit 4x1 / fp32 4x1": ratio(("4-bit", "4x1"), ("fp32", "4x1"))}


def _runs(model: Any, ids: torch.Tensor) -> list[tuple[str, Callable[[], None]]]:
    adapter, layers = architecture_for("llama"), range(4)
    groups = [(group_key(layer, group), group) for layer in layers for group in adapter.channel_groups(model.config)]
    order = {key: torch.randperm(group.units) for key, group in groups}
    units = {width: {key: int(group.units * width) for key, group in groups} for width in WIDTHS}
    depth = DepthStrategy({4: (0, 1, 2, 3), 2: (0, 3)})
    plain = load(model.config.name_or_path, hasattr(model.config, "quantization_config"))
    strategy = SubnetStrategy(depth, WidthStrategy(units, order), model_fingerprint(model, adapter))
    elastic = ElasticModel(model, strategy)
    peft_model = adapted(elastic).train()
    whole = SubnetStrategy(DepthStrategy.whole(4), WidthStrategy.whole(), strategy.fingerprint)
    bare = adapted(unelastic := ElasticModel(plain, whole)).train()
    for group in unelastic.groups:
        for linear in {*group.producers, group.consumer}:
            linear.restore()

    def at(shape: str) -> Callable[[], None]:
        def run() -> None:
            peft_model.zero_grad()
            with elastic.active(shape):
                peft_model(input_ids=ids, labels=ids).loss.backward()

        return run

    def without() -> None:
        bare.zero_grad()
        bare(input_ids=ids, labels=ids).loss.backward()

    return [*((shape, at(shape)) for shape in STEP_SHAPES), ("plain", without)]


def cut(steps: int) -> dict[str, Any]:
    """Train beside either base and measure what is cut from either."""
    demo = str(Path(amoeba_plugin.__file__).parent / "demo" / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo)
    blocks = token_blocks(part_files("train"), tokenizer, block_size=128, limit=128)
    held_out = materialise(_batches(token_blocks(part_files("held_out"), tokenizer, block_size=128, limit=32)))
    adapter, calibration = architecture_for("llama"), materialise(_batches(blocks.select(range(16))))
    kept = DepthStrategy({12: tuple(range(12)), 10: (*range(9), 11)})
    found: dict[str, Any] = {}
    for name, quantized in (("fp32", False), ("4-bit", True)):
        model = load(demo, quantized)
        statistics_ = collect_statistics(model, adapter, calibration)
        width = rank_widths(WidthTask(model, adapter, importance_named("flap"), WIDTHS[:2], statistics_))
        elastic = ElasticModel(model, SubnetStrategy(kept, width, model_fingerprint(model, adapter)))
        untrained = {shape: _loss(extract(elastic, shape), held_out) for shape in CUT_SHAPES}
        peft_model = adapted(elastic)
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                output_dir=directory, max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[],
                save_strategy="no", use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
            )  # fmt: skip
            train_one_for_all(elastic, peft_model, _rows(blocks), OneForAllOptions(train_largest=False), arguments)
            peft_model.eval()
            own = {shape: _loss(extract(elastic, shape), held_out) for shape in CUT_SHAPES}
            save_elastic(elastic, peft_model, Path(directory) / "elastic", demo)
            if quantized:
                full, _ = load_elastic(Path(directory) / "elastic")
                other = {shape: _loss(extract(full, shape), held_out) for shape in CUT_SHAPES}
        found[name] = {
            shape: {"untrained": untrained[shape], "cut from its base": own[shape]}
            | ({"cut from the fp32 base": other[shape]} if quantized else {})
            for shape in CUT_SHAPES
        }
    return found


def _rows(blocks: Any) -> list[dict[str, torch.Tensor]]:
    ids = [torch.as_tensor(row["input_ids"]) for row in blocks]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def _batches(blocks: Any) -> list[dict[str, torch.Tensor]]:
    ids = torch.stack([row["input_ids"] for row in _rows(blocks)])
    return [{"input_ids": part} for part in ids.split(8)]


def _loss(model: Any, batches: Any) -> float:
    return round(objective_named("loss").measure(model, batches).value, 4)


if __name__ == "__main__":
    main()
