"""Loss of layer-wise policies against uniform bits, random mixes and the paper's rule, at the same average bits.

Usage: python tests/benchmarks/layerwise_policy.py [--averages 4.5 5 6] [--bits 4 8 16] [--seeds 3] [--samples 8]
           [--length 256] [--quantizer rtn|gptq] [--sensitivities kl output_error fisher] [--exchanges 4]
       python tests/benchmarks/layerwise_policy.py --model DIRECTORY --text FILE --held-out FILE ...

Without ``--model``: the demo's model, calibrated on its training text, by other blocks for every seed. Printed: average
bits per weight with scales (weights of the decoder layers' linears), held-out loss above the dense model's and KL
divergence from it, both in nats per token (mean of the seeds, least and largest), and CPU seconds of the search.
"random" gives units bits at random within the average. "mean" is Edge-LLM's rule, twice the least bits above the mean
sensitivity; it knows no budget, so each is followed by the knapsack at the very average that it took. RTN is measured
in memory (a test holds that to what llm-compressor stores); GPTQ runs the generated recipe and measures the reloaded
checkpoint. Exchanges are tried with the first sensitivity alone.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.data.batch import Batch, model_inputs
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.demo.corpus import part_files, token_blocks
from amoeba_plugin.demo.data import BLOCK_SIZE, MODEL, batches_of
from amoeba_plugin.errors import BudgetError
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.recipes.policy import PolicyTools, recipe_of
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.layerwise.compress import Compressor
from amoeba_plugin.selection.layerwise.options import Grid, Option
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy
from amoeba_plugin.selection.layerwise.search import PolicyBudget, chosen_options, described
from amoeba_plugin.selection.layerwise.task import DenseStates, SensitivityTask, divergence
from amoeba_plugin.selection.layerwise.units import Unit, layer_units
from amoeba_plugin.selection.registry import objective_named, sensitivity_named

HELD_OUT_BLOCKS = 40
Choice = dict[Unit, Option]
Row = tuple[str, float, float, float, float]  # policy, bits, loss, KL, CPU seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--text", help="calibration text")
    parser.add_argument("--held-out", help="text that losses are of")
    parser.add_argument("--averages", type=float, nargs="+", default=[4.5, 5, 6])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--sensitivities", nargs="+", default=["kl", "output_error", "fisher"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--held-out-samples", type=int, default=HELD_OUT_BLOCKS)
    parser.add_argument("--length", type=int, default=BLOCK_SIZE)
    parser.add_argument("--group-size", type=int, help="default: the largest of 128, 64 and 32 that fits")
    parser.add_argument("--exchanges", type=int, default=4)
    parser.add_argument("--quantizer", choices=["rtn", "gptq"], default="rtn")
    given = parser.parse_args()
    print("Loading", given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    calibration, held_out = _texts(given)
    rows: dict[str, list[Row]] = {}
    for seed in range(given.seeds):
        for row in _measure(given, model, calibration(seed), held_out, seed):
            rows.setdefault(row[0], []).append(row)
            print(
                f"  seed {seed}: {row[0]}: {row[1]:.3f} bits, {row[2]:+.5f}, KL {row[3]:.5f}, {row[4]:.1f} s",
                flush=True,
            )
    print("\n| policy | bits | loss above dense | KL from dense | CPU s |\n|---|---|---|---|---|")
    for name, found in rows.items():
        bits, losses, divergences, seconds = ([row[place] for row in found] for place in (1, 2, 3, 4))
        took = f"{_mean(seconds):.0f}" if any(seconds) else "-"
        print(f"| {name} | {_mean(bits):.3f} | {_shown(losses)} | {_shown(divergences)} | {took} |")


def _texts(given: argparse.Namespace) -> tuple[Callable[[int], list[Batch]], list[Batch]]:
    """Return what draws calibration batches for a seed, one row each, and the held-out batches."""
    tokenizer = load_tokenizer(given.model)
    if given.text is None:
        train = token_blocks(part_files("train"), tokenizer, given.length)
        held_out = token_blocks(part_files("held_out"), tokenizer, given.length).shuffle(seed=42)
        return (
            lambda seed: _rows(batches_of(train.shuffle(seed=seed).select(range(given.samples)))),
            batches_of(held_out.select(range(given.held_out_samples))),
        )
    vocabulary = AutoModelForCausalLM.from_pretrained(given.model).config.vocab_size

    def drawn(text: str, samples: int, seed: int) -> list[Batch]:
        return load_batches(
            text, tokenizer, split="train", num_samples=samples, max_seq_length=given.length, batch_size=1,
            vocab_size=vocabulary, seed=seed,
        )  # fmt: skip

    return (lambda seed: drawn(given.text, given.samples, seed)), drawn(given.held_out, given.held_out_samples, 42)


def _rows(batches: list[Batch]) -> list[Batch]:
    return [
        {name: each[row : row + 1] for name, each in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]


def _measure(
    given: argparse.Namespace, model: PreTrainedModel, batches: list[Batch], held_out: list[Batch], seed: int
) -> Iterator[Row]:
    adapter = architecture_of(model.config)
    units = layer_units(model, adapter)
    budget = PolicyBudget(given.averages[0], bits=tuple(given.bits), group_size=given.group_size)
    grid, loss = budget.grid(units), objective_named("loss")
    dense_loss = loss.measure(model, held_out).value

    def lost(choice: Choice, grid: Grid = grid) -> tuple[float, float]:
        if given.quantizer == "gptq":
            made = _by_gptq(given, choice, grid, batches)
            return loss.measure(made, held_out).value - dense_loss, _divergence(model, made, held_out)
        made = copy.deepcopy(model)
        with Compressor(made, grid).at(choice):
            return loss.measure(made, held_out).value - dense_loss, _divergence(model, made, held_out)

    def bits_of(choice: Choice, grid: Grid = grid) -> float:
        taken = sum(unit.weights * grid.counted(option.bits, unit) for unit, option in choice.items())
        return taken / sum(unit.weights for unit in units)

    for bits in [each for each in given.bits if each < 16]:
        for size in sorted({grid.group_size, 32}, reverse=True):
            choice, finer = {unit: Option(bits) for unit in units}, Grid(size)
            yield f"uniform {bits} bits, groups of {size}", bits_of(choice, finer), *lost(choice, finer), 0.0
    for average in given.averages:
        choice = _at_random(units, average, given.bits, bits_of, random.Random(seed))
        yield f"random, {average:g}", bits_of(choice), *lost(choice), 0.0
    with DenseStates.of(LayerRuns.of(model, adapter, batches)) as dense:
        for name in given.sensitivities:
            task = SensitivityTask(dense, batches, units, budget.lone, Compressor(model, grid), progress=False)
            started = time.process_time()
            scores = sensitivity_named(name).measure(task)
            scoring = time.process_time() - started
            wanted = [(f"{name}, knapsack, {each:g}", replace(budget, average_bits=each, exchanges=0)) for each in
                      given.averages]  # fmt: skip
            if given.exchanges and name == given.sensitivities[0]:
                wanted += [(f"{name}, exchanges, {each:g}", replace(budget, average_bits=each,
                            exchanges=given.exchanges)) for each in given.averages]  # fmt: skip
            try:
                choice, _ = chosen_options(task, replace(budget, average_bits=15.9, rule="mean"), scores)
                yield f"{name}, mean", bits_of(choice), *lost(choice), scoring
                wanted.append(
                    (f"{name}, knapsack, as mean", replace(budget, average_bits=bits_of(choice), exchanges=0))
                )
            except BudgetError as error:
                print(error)
            for label, asked in wanted:
                started = time.process_time()
                choice, _ = chosen_options(task, asked, scores)
                took = scoring + time.process_time() - started
                yield label, bits_of(choice), *lost(choice), took


def _divergence(model: PreTrainedModel, made: PreTrainedModel, held_out: list[Batch]) -> float:
    """Return the KL divergence from the dense model, nats per token."""
    nats, tokens = 0.0, 0
    for batch in held_out:
        inputs, present = model_inputs(batch, model.device), batch["attention_mask"].bool()
        with torch.no_grad():
            p, q = (each(**inputs, use_cache=False).logits[present].log_softmax(-1) for each in (model, made))
        nats, tokens = nats + divergence(p, p.exp(), q), tokens + int(present.sum())
    return nats / tokens


def _at_random(
    units: list[Unit], average: float, bits: list[int], bits_of: Callable[[Choice], float], rng: random.Random
) -> Choice:
    """Return bits at random: from the least on, units drawn get more as long as that fits."""
    order = sorted(bits)
    choice = {unit: Option(order[0]) for unit in units}
    for unit in rng.sample(units, len(units)):
        for more in rng.sample(order[1:], len(order) - 1):
            raised = choice | {unit: Option(more)}
            if bits_of(raised) <= average:
                choice = raised
                break
    return choice


def _by_gptq(given: argparse.Namespace, choice: Choice, grid: Grid, batches: list[Batch]) -> PreTrainedModel:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    policy = LayerwisePolicy(
        sensitivity="-", allocation="-", group_size=grid.group_size, symmetric=True, units=described(choice, {})
    )
    with tempfile.TemporaryDirectory() as directory:
        whole = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        recipe = Path(directory) / "policy.yaml"
        recipe.write_text(recipe_of(policy, whole, PolicyTools(quantizer="gptq")))
        oneshot(
            model=given.model, recipe=str(recipe), dataset=DataLoader(batches, batch_size=None), precision="float32",
            output_dir=str(Path(directory) / "out"), num_calibration_samples=len(batches),
        )  # fmt: skip
        return AutoModelForCausalLM.from_pretrained(Path(directory) / "out", dtype=torch.float32).eval()


def _shown(values: list[float]) -> str:
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(set(values)) > 1 else ""
    return f"{_mean(values):.4f}{spread}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
