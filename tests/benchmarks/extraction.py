"""Seconds to cut one shape out of an elastic checkpoint of the demo's model, against loading the model alone.

Usage: python tests/benchmarks/extraction.py [--shapes 12x1 10x7/8 8x3/4] [--rounds 5]

Prints the median of each, and the ratio to loading the base model with transformers and saving it again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from amoeba_plugin.architecture import group_key
from amoeba_plugin.checkpoint import attach_smol, extract_checkpoint, save_elastic
from amoeba_plugin.demo.run import MODEL
from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.plugins import architecture_for
from amoeba_plugin.smol import SmolConfig
from amoeba_plugin.strategy import DepthStrategy, SubnetStrategy, WidthStrategy, model_fingerprint

WIDTHS = (Fraction(1), Fraction(7, 8), Fraction(3, 4))


def elastic_checkpoint(directory: Path) -> None:
    """Write an elastic checkpoint with random orders and a random adapter."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    adapter = architecture_for("llama")
    groups = [(layer, group) for layer in range(12) for group in adapter.channel_groups(model.config)]
    order = {group_key(layer, group): torch.randperm(group.units) for layer, group in groups}
    units = {width: {group_key(layer, group): int(group.units * width) for layer, group in groups} for width in WIDTHS}
    depth = DepthStrategy({count: tuple(range(count)) for count in range(8, 13)})
    strategy = SubnetStrategy(depth, WidthStrategy(units, order), model_fingerprint(model, adapter))
    elastic = ElasticModel(model, strategy)
    config = SmolConfig(r=16, target_modules="all-linear", init_weights=False)
    save_elastic(elastic, attach_smol(elastic, config), directory, str(MODEL))


def seconds(action: Callable[[Path], object], rounds: int) -> float:
    """Return the median seconds of an action that writes into a new directory."""
    taken = []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            action(Path(scratch) / "out")
            taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["12x1", "10x7/8", "8x3/4"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "elastic"
        elastic_checkpoint(directory)
        load = seconds(
            lambda out: AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(out),
            options.rounds,
        )
        print(f"load and save the base   {load:6.2f} s   1.00x")
        for shape in options.shapes:
            cut = seconds(lambda out, shape=shape: extract_checkpoint(directory, shape, out), options.rounds)
            print(f"extract {shape:<8} + parity {cut:6.2f} s  {cut / load:5.2f}x")


if __name__ == "__main__":
    main()
