"""How well a profile of a quarter of a grid predicts the rest of it, on this machine.

All shapes of 9 depths x 5 widths of the demo's model are measured, in rounds that visit all of them; those that a
profile would measure are fitted, and the others compared, beside what a second look at them would differ by::

    python tests/benchmarks/profile_accuracy.py llama-cpp:Q4_0 torch:elastic     # 2 to 8 minutes a flow
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from amoeba_plugin.demo.data import MODEL
from amoeba_plugin.deployment.profiling.asked import flows_of, subject_of
from amoeba_plugin.deployment.profiling.cost_model import CostModel, cost_models
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model

DEPTHS = [str(depth) for depth in range(12, 3, -1)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flows", nargs="+")
    subject = subject_of(str(MODEL), None, DEPTHS, [])
    how = Measuring(prompts=(32, 96, 192))
    chosen = {str(shape) for shape in how.chosen(subject)}
    print(f"{len(chosen)} of {len(subject.space)} shapes are fitted\n")
    print("| flow | phase | median error | 95th percentile | in the interval | second process, median | seconds |")
    print("|---|---|---|---|---|---|---|")
    for point, flow in flows_of(parser.parse_args().flows).items():
        with tempfile.TemporaryDirectory() as scratch:
            everything = Measuring(prompts=how.prompts, shapes=len(subject.space))
            begun = time.perf_counter()
            profile = profile_model(subject, {point: flow}, Path(scratch) / "profile.json", everything, "demo")
            seconds = time.perf_counter() - begun
        for phase in ("prefill", "decode"):
            samples = cost_models(profile.flows[str(point)])[phase].samples
            model = CostModel([sample for sample in samples if sample.shape in chosen])
            rest = [sample for sample in samples if sample.shape not in chosen]
            told = [model.predict(sample.work, sample.tokens) for sample in rest]
            errors = sorted(abs(each.value / sample.value - 1) for each, sample in zip(told, rest, strict=True))
            held = statistics.mean(
                each.low <= sample.value <= each.high for each, sample in zip(told, rest, strict=True)
            )
            noise = statistics.median(sample.spread for sample in rest)
            worst = errors[int(0.95 * len(errors))]
            print(
                f"| {point} | {phase} | {statistics.median(errors):.1%} | {worst:.1%} | {held:.0%} | {noise:.1%} "
                f"| {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
