"""Memory and time of what a service keeps resident: an elastic checkpoint in torch, or deployed files side by side::

    python tests/benchmarks/resident_shapes.py ELASTIC --shapes 30x1,24x3/4
    python tests/benchmarks/resident_shapes.py OUT OUT          # what `amoeba deploy` wrote

Bytes are those of all processes, of this one too, once every shape has answered; seconds are of all CPUs, which other
programs do not lengthen as they do those by the clock. One thread.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from amoeba_plugin.deployment.deployed import is_deployed
from amoeba_plugin.deployment.deployed_shapes import DeployedShapes
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.serving.backend import Backend, TorchBackend
from amoeba_plugin.serving.files import FilesBackend
from amoeba_plugin.shape import SubnetShape

PROMPT, DECODED, ROUNDS, CONTEXT = 128, 48, 3, 2048
TICK = os.sysconf("SC_CLK_TCK")


def processes() -> list[Path]:
    """Return this process and its children."""
    own = Path(f"/proc/{os.getpid()}")
    children = (own / "task" / own.name / "children").read_text().split()
    return [own, *(own.with_name(each) for each in children)]


def cpu_seconds() -> float:
    """Return what all processes have computed."""
    fields = [(each / "stat").read_text().rpartition(")")[2].split() for each in processes()]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICK


def resident_mib() -> dict[str, float]:
    """Return the proportional share of memory of all processes, and its part that no file holds."""
    told: dict[str, float] = {"Pss": 0, "Pss_Anon": 0}
    for each in processes():
        lines = (each / "smaps_rollup").read_text().splitlines()[1:]
        found = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        told = {name: value + found[name] / 1024 for name, value in told.items()}
    return told


def took(backend: Backend, shape: SubnetShape, vocabulary: int) -> tuple[float, float]:
    """Return CPU seconds to the first token, and for each behind it: the least of some rounds."""
    draw, first, each = random.Random(0), [], []
    for _ in range(ROUNDS):
        prompt = [draw.randrange(vocabulary) for _ in range(PROMPT)]
        before = cpu_seconds()
        cache, logits = backend.prefill(shape, prompt)
        first.append(cpu_seconds() - before)
        before = cpu_seconds()
        for _ in range(DECODED):
            logits = backend.step(shape, cache, int(logits.argmax()))
        each.append((cpu_seconds() - before) / DECODED)
    return min(first), min(each)


def opened(models: Sequence[Path]) -> tuple[TorchBackend | FilesBackend, int]:
    """Return the backend of what was named, and its vocabulary."""
    if is_deployed(models[0]):
        served = DeployedShapes.of(models).served()
        vocabulary = next(iter(served.values())).vocabulary
        return FilesBackend(models, vocabulary, CONTEXT), vocabulary
    live, _ = load_elastic(models[0])
    live.model.float()  # as a service does on a CPU
    return TorchBackend(live), live.config.vocab_size


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--shapes", default="", help="of an elastic checkpoint; default: the largest and the smallest")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = resident_mib()
    backend, vocabulary = opened(given.models)
    with backend if isinstance(backend, FilesBackend) else nullcontext():
        named = [backend.space.require(each) for each in given.shapes.split(",") if each]
        files = isinstance(backend, FilesBackend)
        shapes = named or (list(backend.space) if files else [backend.space.largest, backend.space.smallest])
        print(f"| shape | CPU ms to the first token of {PROMPT} | CPU ms for each behind it |\n|---|---|---|")
        for shape in shapes:
            first, each = took(backend, shape, vocabulary)
            print(f"| {shape} | {first * 1e3:.0f} | {each * 1e3:.1f} |", flush=True)
        after = resident_mib()
        print(
            f"\n{after['Pss']:.0f} MiB are resident, {after['Pss_Anon']:.0f} of them no file's, in {len(processes())} "
            f"processes; {before['Pss']:.0f} were before anything was loaded"
        )


if __name__ == "__main__":
    main()
