"""What a token takes where an elastic service computes those of several requests in one step, against one by one.

One thread, CPU time, medians of rounds in which all numbers of requests take turns; every step copies keys and
values of the requests into one batch and back, as the service does::

    python tests/benchmarks/requests_together.py ELASTIC --shapes 30x1 20x1/2 --prompts 32 256
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.serving.backend import AT_ONCE, TorchBackend
from amoeba_plugin.shape import SubnetShape

TOGETHER = [number for number in (1, 2, 4, 8) if number <= AT_ONCE]


def seconds_per_token(backend: TorchBackend, shape: SubnetShape, prompt: int, rounds: int) -> dict[int, float]:
    """Return CPU seconds of a token, by the number of requests whose tokens are one step."""
    draw = torch.Generator().manual_seed(0)
    caches = [
        backend.prefill(shape, torch.randint(3, 1000, (prompt - each % 8,), generator=draw).tolist())[0]
        for each in range(max(TOGETHER))
    ]
    took: dict[int, list[float]] = {number: [] for number in TOGETHER}
    for token in range(rounds):
        for number, found in took.items():
            begun = time.process_time()
            if number == 1:
                backend.step(shape, caches[0], 5 + token)
            else:
                backend.steps(shape, caches[:number], [5 + token] * number)
            found.append((time.process_time() - begun) / number)
    return {number: median(found) for number, found in took.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elastic", type=Path)
    parser.add_argument("--shapes", nargs="+", help="default: the largest and the smallest")
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 256])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    live, _ = load_elastic(options.elastic)
    backend = TorchBackend(live)
    shapes = options.shapes or [str(live.space.largest), str(live.space.smallest)]
    print("| shape | tokens so far | alone, ms | " + " | ".join(f"{number} together" for number in TOGETHER[1:]) + " |")
    print("|---" * (3 + len(TOGETHER[1:])) + "|")
    for shape in shapes:
        for prompt in options.prompts:
            found = seconds_per_token(backend, live.space.require(shape), prompt, options.rounds)
            gains = [f"{found[1] / found[number]:.2f}x" for number in TOGETHER[1:]]
            print(f"| {shape} | {prompt} | {found[1] * 1e3:.1f} | {' | '.join(gains)} |", flush=True)


if __name__ == "__main__":
    main()
