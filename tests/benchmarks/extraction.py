"""CPU time and peak memory of cutting shapes out of an elastic checkpoint, against loading and saving its base.

Usage: python tests/benchmarks/extraction.py [--hidden 1024] [--layers 12] [--shapes 12x1 9x3/4] [--rounds 3]
       [--stored bfloat16] [--computed float32] [--no-adapter]
       python tests/benchmarks/extraction.py --elastic DIRECTORY [--base DIRECTORY] [--shapes ...] [--rounds 3]

Without ``--elastic``: a random Llama in shards of a sixteenth of its size, with a SMOL adapter. Every measurement is a
process of its own with one thread (idle ones that wait for work would count too), in rounds, one of each kind after the
other, so that other work on the machine falls on all. The least CPU time of each, in user and system mode, after
imports, and the highest peak are printed; memory is the highest resident set (files that are mapped count), less that
of a process that has imported the same and done nothing. "extract" is what `amoeba extract` does without the tokenizer
and the comparison that follows (extract and save), "with parity" is all of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
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
from amoeba_plugin.elastic.record import read_record
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.extraction.checkpoint import extract_checkpoint
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.runtime.whole_weights import weight_files
from amoeba_plugin.smol import SmolConfig

WIDTHS = (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(1, 2))
NOTHING, WHOLE = "nothing", "load and save the base"
WAYS = (NOTHING, WHOLE, "extract, base in memory", "extract, base on disk", "with parity")


def write_base(root: Path, hidden: int, layers: int, stored: torch.dtype) -> None:
    """Write a random model."""
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
        intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, vocab_size=32000,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=stored).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(root / "base", max_shard_size=size // 16)


def write_elastic(root: Path, computed: torch.dtype, adapted: bool) -> None:
    """Write an elastic checkpoint of the base with random orders and, on request, a random adapter."""
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=computed).eval()
    adapter, layers = architecture_for("llama"), model.config.num_hidden_layers
    groups = [(layer, group) for layer in range(layers) for group in adapter.channel_groups(model.config)]
    order = {group_key(layer, group): torch.randperm(group.units) for layer, group in groups}
    units = {width: {group_key(layer, group): int(group.units * width) for layer, group in groups} for width in WIDTHS}
    depth = DepthStrategy({count: tuple(range(count)) for count in range(layers // 2, layers + 1)})
    strategy = SubnetStrategy(depth, WidthStrategy(units, order), model_fingerprint(model, adapter))
    elastic = ElasticModel(model, strategy)
    config = SmolConfig(r=4, num_experts=2, top_k=2, target_modules="all-linear", init_weights=False)
    config.exclude_modules = ["lm_head"]
    peft_model = attach_smol(elastic, config) if adapted else None
    save_elastic(elastic, peft_model, root / "elastic", str(root / "base"))


def act(way: str, elastic: Path, base: str, shape: str, out: Path) -> None:
    """Do one thing that is to be measured."""
    if way == WHOLE:
        AutoModelForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(out)
    elif way == "with parity":
        extract_checkpoint(elastic, shape, out, base)
    elif way != NOTHING:
        model, _ = load_elastic(elastic, base, stream=way == "extract, base on disk")
        extract(model, shape).save_pretrained(out)


def peak_memory() -> int:
    """Return the most bytes this process had resident (Linux); ru_maxrss would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def measure(*task: str) -> dict[str, float]:
    """Return CPU seconds and peak bytes of a process that does one thing."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *task],
        check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{task}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report_measured(way: str, elastic: str, base: str, shape: str) -> None:
    """Do one thing and print what :func:`measure` reads."""
    gc.freeze()  # whichever way the collector comes along first would pay for all that is imported
    with tempfile.TemporaryDirectory() as scratch:
        started = time.process_time()
        act(way, Path(elastic), base, shape, Path(scratch) / "out")
        taken = time.process_time() - started
    print(json.dumps({"seconds": taken, "peak": peak_memory()}))


def print_table(elastic: Path, base: str, shape: str, rounds: int) -> None:
    """Measure a shape every way, in rounds, and print."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, figures in found.items():
            figures.append(measure(way, str(elastic), base, shape))
    least = {way: min(each["seconds"] for each in figures) for way, figures in found.items()}
    peak = {way: max(each["peak"] for each in figures) for way, figures in found.items()}
    memory = {way: peak[way] - peak[NOTHING] for way in WAYS}
    print(f"\n{shape:<26}{'CPU seconds':>12}{'of load and save':>18}{'peak MB':>10}{'of load and save':>18}")
    for way in WAYS[1:]:
        print(
            f"{way:<26}{least[way]:12.2f}{least[way] / least[WHOLE]:17.2f}x"
            f"{memory[way] / 1e6:10.0f}{memory[way] / memory[WHOLE]:17.2f}x",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elastic", type=Path, help="an elastic checkpoint, in place of a random one")
    parser.add_argument("--base", help="where its base is now")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shapes", nargs="+", help="default: the largest and the smallest")
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32", help="dtype of the base")
    parser.add_argument("--computed", choices=("float32", "bfloat16"), default="float32", help="of the elastic model")
    parser.add_argument("--no-adapter", action="store_true", help="nothing was trained")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        report_measured(*options.measure)
        return
    with tempfile.TemporaryDirectory() as scratch:
        elastic, base = options.elastic, options.base
        if elastic is None:
            elastic, base = Path(scratch) / "elastic", str(Path(scratch) / "base")
            write_base(Path(scratch), options.hidden, options.layers, getattr(torch, options.stored))
            write_elastic(Path(scratch), getattr(torch, options.computed), not options.no_adapter)
        base = base or read_record(elastic).base_of(elastic)
        space = SubnetStrategy.load(elastic).space
        print(f"base of {sum(path.stat().st_size for path in weight_files(Path(base))) / 1e6:.0f} MB, {space}")
        for shape in options.shapes or [str(space.largest), str(space.smallest)]:
            print_table(elastic, base, shape, options.rounds)


if __name__ == "__main__":
    main()
