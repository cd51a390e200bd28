"""Seconds and peak memory of one one-for-all step, against a plain implementation of the same step.

Plain is how the reference code does it: every subnet at full size with 0/1 masks on the channels it lacks, logits at
every position, fp32 softmax over all of them. Model, data, shapes and gradients are the same: the largest difference of
gradients is printed, and above fp32 rounding the script fails. Each variant runs in processes of its own: the peak of
resident memory is that variant's own, on a GPU that of its allocations. The first step is not timed. Prints one JSON
object::

    python tests/benchmarks/training_step.py --layers 8 --hidden 256 --vocabulary 32000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from amoeba_plugin.elastic.checkpoint import attach_smol
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.shape import SubnetShape
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.training.one_for_all.options import OneForAllOptions
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer

WIDTHS = (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(5, 8))
VARIANTS = ("plain", "amoeba")
ROUNDING = 1e-4  # of the largest gradient: sums of thousands of fp32 products, in another order
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Run both variants and print their figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 8),
        ("hidden", 128),
        ("vocabulary", 8192),
        ("batch", 4),
        ("length", 256),
        ("steps", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--response", type=float, default=0.5, help="share of positions that are targets")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both variants")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.variant:
        print(json.dumps(measure(settings)))
        return
    print(json.dumps(compare(sys.argv[1:]), indent=1))


def compare(arguments: Sequence[str]) -> dict[str, Any]:
    """Run each variant in fresh processes; return figures, ratios and the largest relative gradient difference."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / f"{variant}.safetensors" for variant in VARIANTS]
        for variant, file in zip(VARIANTS, files, strict=True):
            command = [sys.executable, __file__, *arguments, "--variant", variant, "--gradients", str(file)]
            # glibc keeps freed blocks of up to 32 MiB, in holes that depend on the order of allocations. For the peak
            # every block above 1 MiB gets a mapping of its own; that costs time, so time is measured without.
            figures[variant] = run_child(command, {}) | {
                "peak_mib": run_child(command, {"MALLOC_MMAP_THRESHOLD_": str(2**20)})["peak_mib"]
            }
        plain, amoeba = (load_file(file) for file in files)
    scale = max(float(value.abs().max()) for value in plain.values())
    figures["time_ratio"] = figures["amoeba"]["seconds_per_step"] / figures["plain"]["seconds_per_step"]
    figures["memory_ratio"] = figures["amoeba"]["peak_mib"] / figures["plain"]["peak_mib"]
    difference = max(float((amoeba[name] - value).abs().max()) for name, value in plain.items())
    figures["gradient_difference"] = difference / scale
    if not figures["gradient_difference"] < ROUNDING:
        raise SystemExit(f"the variants compute different gradients: {json.dumps(figures)}")
    return figures


def run_child(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run one variant; its last line of output is its figures."""
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def measure(settings: argparse.Namespace) -> dict[str, float]:
    """Time the steps of one variant; memory is what they add to that of the loaded model."""
    elastic, model = build(settings)
    batch = make_batch(settings)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, report_to="none", use_cpu=DEVICE == "cpu", disable_tqdm=True
        )
        trainer = OneForAllTrainer(model, elastic, OneForAllOptions(sampled_shapes="independent"), args=arguments)
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    if settings.checkpointing:
        elastic.model.gradient_checkpointing_enable({"use_reentrant": False})
        elastic.model.enable_input_require_grads()

    def amoeba(step: int) -> None:
        trainer.state.global_step = step
        trainer.training_step(model, dict(batch), num_items)

    def plain(step: int) -> None:
        plain_step(elastic, model, batch, trainer.sampler.shapes(step))

    run: Callable[[int], None] = {"amoeba": amoeba, "plain": plain}[settings.variant]
    seconds, before = [], used_mib()
    model.train()
    for step in range(settings.steps):
        model.zero_grad()
        started = time.perf_counter()
        run(step)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    save_file(gradients, settings.gradients)
    return {
        "seconds_per_step": sum(seconds[1:]) / len(seconds[1:]),
        "peak_mib": peak_mib() - before,
        "model_mib": before,
    }


def build(settings: argparse.Namespace) -> tuple[ElasticModel, PeftModel]:
    """Make a random model elastic in the paper's proportions (5/8 of the depth), with a SMOL adapter."""
    torch.manual_seed(0)
    heads = 8
    config = LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.hidden * 3,
        num_hidden_layers=settings.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=settings.length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE)
    adapter = architecture_for("llama")
    groups = adapter.channel_groups(config)
    keys = [(group_key(layer, group), group) for layer in range(settings.layers) for group in groups]
    units = {width: {key: int(group.units * width) for key, group in keys} for width in WIDTHS}
    depths = range(settings.layers, settings.layers * 5 // 8 - 1, -1)
    kept = {depth: (*range(depth - 1), settings.layers - 1) for depth in depths}
    strategy = SubnetStrategy(DepthStrategy(kept), WidthStrategy(units), model_fingerprint(model, adapter))
    elastic = ElasticModel(model, strategy)
    smol = SmolConfig(r=16, combination="factors", init_weights=False, router_noise=False, target_modules="all-linear")
    return elastic, attach_smol(elastic, smol)


def make_batch(settings: argparse.Namespace) -> dict[str, Tensor]:
    """Draw tokens of which the last part of each row is the response."""
    tokens = torch.randint(settings.vocabulary, (settings.batch, settings.length))
    prompt = settings.length - int(settings.length * settings.response)
    labels = tokens.clone()
    labels[:, :prompt] = -100
    return {"input_ids": tokens.to(DEVICE), "labels": labels.to(DEVICE)}


def plain_step(elastic: ElasticModel, model: PeftModel, batch: dict[str, Tensor], shapes: list[SubnetShape]) -> None:
    """Run the reference's step (with its off-by-one put right): masks, full-length logits."""
    mask = batch["labels"][:, 1:] != -100
    teacher = largest = None
    for shape in shapes:
        with masked(elastic, model, shape):
            logits = model(input_ids=batch["input_ids"]).logits.float()[:, :-1]
            if teacher is None:
                loss = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100)
                teacher, largest = logits.detach(), loss.detach()
            else:
                soft = -(torch.softmax(teacher, -1) * torch.log_softmax(logits, -1)).sum(-1)
                loss = (soft * mask).sum() / mask.sum()
                loss = (largest / loss.detach()) * loss
            loss.backward()


@contextmanager
def masked(elastic: ElasticModel, model: PeftModel, shape: SubnetShape) -> Any:
    """Activate a shape's depth at full width, and zero the channels that its width lacks."""
    before = elastic.shape
    with ExitStack() as hooks:
        elastic.set_shape(SubnetShape(shape.depth, Fraction(1)))
        model.set_shape(shape, elastic.kept_layers(shape))
        for index in elastic.kept_layers(shape):
            for group in elastic.adapter.channel_groups(elastic.config):
                units = elastic.plan.units(shape.width, group_key(index, group), group)
                for axis in group.producers:
                    mask = torch.zeros(group.units * axis.channels_per_unit, device=DEVICE)
                    mask[: units * axis.channels_per_unit] = 1
                    module = elastic.layers[index].get_submodule(axis.path)
                    handle = module.register_forward_hook(lambda _module, _args, output, mask=mask: output * mask)
                    hooks.callback(handle.remove)
        yield
    elastic.set_shape(before)


def used_mib() -> float:
    """Return the memory in use now, and start to watch its peak."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark, which building the model raised
    return status_mib("VmRSS")


def peak_mib() -> float:
    """Return the most memory in use since :func:`used_mib`."""
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else status_mib("VmHWM")


def status_mib(name: str) -> float:
    """Return a field of this process's memory status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
