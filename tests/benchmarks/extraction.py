"""Seconds and peak memory of cutting one shape out of an elastic checkpoint, base on disk against base in memory.

Usage: python tests/benchmarks/extraction.py [--hidden 512] [--layers 24] [--shapes 24x1 18x3/4]

A random Llama in shards of a sixteenth of its size, fp32, with a SMOL adapter. Every measurement is a process of its
own; memory is the highest resident set, less that of a process that has imported the same and done nothing. "extract"
is what `amoeba extract` does without the comparison that follows (extract and save), "with parity" is all of it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from amoeba_plugin.elastic.checkpoint import attach_smol, load_elastic, save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.smol import SmolConfig

WIDTHS = (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(1, 2))
WAYS = ("nothing", "load and save the base", "extract, base in memory", "extract, base on disk", "with parity")


def write_elastic(root: Path, hidden: int, layers: int) -> int:
    """Write a base and an elastic checkpoint with random orders and a random adapter; return the base's bytes."""
    heads = hidden // 64
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64,
        intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, vocab_size=32000,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    model.save_pretrained(root / "base", max_shard_size=size // 16)
    adapter = architecture_for("llama")
    groups = [(layer, group) for layer in range(layers) for group in adapter.channel_groups(model.config)]
    order = {group_key(layer, group): torch.randperm(group.units) for layer, group in groups}
    units = {width: {group_key(layer, group): int(group.units * width) for layer, group in groups} for width in WIDTHS}
    depth = DepthStrategy({count: tuple(range(count)) for count in range(layers // 2, layers + 1)})
    strategy = SubnetStrategy(depth, WidthStrategy(units, order), model_fingerprint(model, adapter))
    elastic = ElasticModel(model, strategy)
    config = SmolConfig(r=4, num_experts=2, top_k=2, target_modules="all-linear", init_weights=False)
    config.exclude_modules = ["lm_head"]
    save_elastic(elastic, attach_smol(elastic, config), root / "elastic", str(root / "base"))
    return size


def act(way: str, root: Path, shape: str, out: Path) -> None:
    """Do one thing that is to be measured."""
    if way == "load and save the base":
        AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).save_pretrained(out)
    elif way == "with parity":
        extract_checkpoint(root / "elastic", shape, out)
    elif way != "nothing":
        elastic, _ = load_elastic(root / "elastic", stream=way == "extract, base on disk")
        extract(elastic, shape).save_pretrained(out)


def peak_memory() -> int:
    """Return the most bytes this process had resident (Linux); ru_maxrss would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def measure(way: str, root: Path, shape: str) -> dict[str, float]:
    """Return seconds and peak bytes of a process that does one thing."""
    command = [sys.executable, __file__, "--measure", way, str(root), shape]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shapes", nargs="+", default=["24x1", "18x3/4"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, root, shape = options.measure
        with tempfile.TemporaryDirectory() as scratch:
            started = time.process_time()
            act(way, Path(root), shape, Path(scratch) / "out")
            taken = time.process_time() - started
        print(json.dumps({"seconds": taken, "peak": peak_memory()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        size = write_elastic(Path(scratch), options.hidden, options.layers)
        print(f"base {size / 1e6:.0f} MB in shards of {size / 16e6:.0f} MB")
        for shape in options.shapes:
            found = {way: measure(way, Path(scratch), shape) for way in WAYS}
            idle = found.pop("nothing")["peak"]
            whole = found["load and save the base"]
            print(f"\n{shape:<26}{'CPU seconds':>12}{'peak MB':>10}{'of the base':>13}")
            for way, figures in found.items():
                memory = figures["peak"] - idle
                print(
                    f"{way:<26}{figures['seconds']:12.2f}{memory / 1e6:10.0f}{memory / size:12.2f}x"
                    f"   time {figures['seconds'] / whole['seconds']:.2f}x"
                )


if __name__ == "__main__":
    main()
