"""What the search over depths costs and finds: in lockstep against one subnet after another, and against all subsets.

Usage: python tests/benchmarks/depth_search.py [cost|regret|count] [--layers 12] [--min-depth 8] [--samples 20]
       [--length 256] [--exchanges 1] [--model demo|random]

``cost`` prints layer-forwards and CPU seconds side by side; a layer-forward is one decoder layer run on one subnet's
states of one batch. ``regret`` measures every subset of layers that could go, and prints how far from the best one the
dynamic program, beams and exchanges end. ``count`` prints the layer-forwards of the paper's setting, without a model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from amoeba_plugin import demo, depth
from amoeba_plugin.calibration import Batch, materialise
from amoeba_plugin.depth import search_depths
from amoeba_plugin.lockstep import WHOLE, Removed, walk
from amoeba_plugin.lockstep_check import Contract, check_contract
from amoeba_plugin.measured import MeasuredTable
from amoeba_plugin.objectives import PerTokenLoss, Score, evaluating
from amoeba_plugin.plugins import architecture_for
from amoeba_plugin.recurrence import Search, Table
from amoeba_plugin.strategy import DepthStrategy

BATCH_SIZE = 8


def random_model(layers: int, seed: int) -> PreTrainedModel:
    """Return a random Llama whose layers all matter: at their initial size they are next to the identity."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4)
    return model


def model_and_batches(options: argparse.Namespace, seed: int = 0) -> tuple[PreTrainedModel, list[Batch]]:
    """Return the demo's model on its selection data, or a random one on random tokens."""
    if options.model == "demo":
        from amoeba_plugin.demo.corpus import part_files, token_blocks

        path = Path(demo.__file__).parent / "model"
        blocks = token_blocks(part_files("train"), AutoTokenizer.from_pretrained(path), options.length)
        rows = torch.tensor(blocks.shuffle(seed=42).select(range(options.samples))["input_ids"])
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    else:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 512, (options.samples, options.length), generator=generator)
        model = random_model(options.layers, seed)
    return model, materialise({"input_ids": part} for part in rows.split(BATCH_SIZE))


def cost(options: argparse.Namespace) -> None:
    """Print layer-forwards and CPU seconds, one subnet after another and in lockstep."""
    model, batches = model_and_batches(options)
    adapter = architecture_for("llama")
    print(
        f"{len(model.model.layers)} layers to {options.min_depth}, last one kept, {options.exchanges} round(s) of "
        f"exchanges; {options.samples} x {options.length} tokens in {len(batches)} batches, "
        f"{torch.get_num_threads()} thread(s)\n"
    )
    print(f"{'':16}{'subnets':>9}{'layer-forwards':>16}{'calls':>8}{'CPU seconds':>13}")
    contract = check_contract(model, adapter, batches)
    found: list[DepthStrategy] = []
    for name, how in (("one by one", Contract("for comparison")), ("in lockstep", contract)):
        with mock.patch.object(depth, "check_contract", return_value=how):
            start = time.process_time()
            strategy = search_depths(
                model, adapter, PerTokenLoss(), batches,
                min_depth=options.min_depth, exchanges=options.exchanges, progress=False,
            )  # fmt: skip
        took, seconds = strategy.search, time.process_time() - start
        forwards = took["layer_forwards"] // len(batches)
        calls = took.get("layer_calls", took["layer_forwards"]) // len(batches)
        print(f"{name:16}{took['measured']:9d}{forwards:16d}{calls:8d}{seconds:13.2f}")
        found.append(strategy)
    if found[0].kept != found[1].kept:
        raise SystemExit("the two strategies differ")
    worst = max(abs(found[0].metric[d] / found[1].metric[d] - 1) for d in found[0].metric)
    print(f"\nthe same layers kept at every depth; losses differ by {worst:.1e} at most, relative")


def regret(options: argparse.Namespace) -> None:
    """Print how far from the best subset each way to search ends, in nats, averaged over models."""
    seeds = [0] if options.model == "demo" else range(options.models)
    rows: dict[str, list[dict[int, float]]] = {}
    subnets: dict[str, list[int]] = {}
    for seed in seeds:
        model, batches = model_and_batches(options, seed)
        for name, found, asked in searches(model, batches, options.min_depth):
            rows.setdefault(name, []).append(found)
            subnets.setdefault(name, []).append(asked)
    removed = list(rows["all subsets"][0])
    print(f"{'':34}{'subnets':>8}" + "".join(f"{f'-{count}':>10}" for count in removed))
    for name, each in rows.items():
        mean = {count: math.fsum(found[count] for found in each) / len(each) for count in removed}
        shown = "".join(f"{mean[count]:10.4f}" for count in removed)
        print(f"{name:34}{math.fsum(subnets[name]) / len(each):8.0f}{shown}")


def searches(
    model: PreTrainedModel, batches: Sequence[Batch], min_depth: int
) -> list[tuple[str, dict[int, float], int]]:
    """Return for every way to search its name, loss above the best subset's by layers removed, and subnets scored."""
    adapter, objective = architecture_for("llama"), PerTokenLoss()
    layers = len(model.model.layers)
    candidates, most = layers - 1, layers - min_depth
    with (
        depth._Measurement.of(
            model, adapter, objective, batches, batches, candidates, 2**32, lambda n: None
        ) as measure,
        evaluating(model),
    ):
        everything = MeasuredTable(measure, {})
        sets = [Removed(s) for count in range(most + 1) for s in itertools.combinations(range(candidates), count)]
        everything(sets)
        best = {
            count: min(everything.scores[each].value for each in sets if len(each) == count)
            for count in range(1, most + 1)
        }

        def above(table: Table) -> dict[int, float]:
            return {count: score.value - best[count] for count, (_, score) in table.items()}

        results = [("all subsets", dict.fromkeys(best, 0.0), len(sets))]
        for beam, rounds in ((1, 0), (4, 0), (16, 0), (1, 1), (1, 99), (4, 99)):
            asked = MeasuredTable(everything, {})
            search = Search(asked, objective)
            table = search.exchange(search.shrink(candidates, most, beam), candidates, rounds)
            name = f"dynamic program, beam {beam}" + (
                f", {rounds} exchange" if rounds == 1 else ", exchanges" * (rounds > 1)
            )
            results.append((name, above(table), len(asked.scores)))
        rng = random.Random(0)
        drawn = [[Removed(rng.sample(range(candidates), count)) for count in best] for _ in range(20)]
        mean = {
            count: math.fsum(everything.scores[each[count - 1]].value for each in drawn) / len(drawn) - best[count]
            for count in best
        }
    return [*results, ("one random subset (mean of 20)", mean, 1)]


def count(options: argparse.Namespace) -> None:
    """Print the layer-forwards of 32 layers to 20 with scores drawn at random, and with layers that go one by one."""
    for name, weight in (("random scores", 0.0), ("every layer its own harm", 1.0)):
        forwards = []
        for seed in range(20):
            rng = random.Random(seed)
            harm = [rng.random() for _ in range(31)]
            steps: list[list[Removed]] = [[WHOLE]]

            def evaluate(
                sets: Sequence[Removed],
                steps: list[list[Removed]] = steps,
                harm: list[float] = harm,
                rng: random.Random = rng,
                weight: float = weight,
            ) -> list[Score]:
                steps.append(list(sets))
                return [Score(weight * sum(harm[i] for i in each) + 0.1 * rng.random(), 0.0) for each in sets]

            Search(evaluate, PerTokenLoss()).shrink(31, 12)
            forwards.append(sum(len(visit.through) for step in steps for visit in walk(step, 32)))
        mean = sum(forwards) / len(forwards)
        print(
            f"{name}: {mean:.0f} layer-forwards in lockstep ({min(forwards)} to {max(forwards)}), the whole model's "
            f"included; 7946 one by one: {7946 / mean:.1f}x"
        )


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["cost", "regret", "count"], nargs="?", default="cost")
    parser.add_argument("--model", choices=["demo", "random"], default="demo")
    parser.add_argument("--models", type=int, default=10, help="random models to average regret over")
    parser.add_argument("--layers", type=int, default=12, help="of a random model")
    parser.add_argument("--min-depth", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--exchanges", type=int, default=1)
    options = parser.parse_args()
    {"cost": cost, "regret": regret, "count": count}[options.what](options)


if __name__ == "__main__":
    main()
