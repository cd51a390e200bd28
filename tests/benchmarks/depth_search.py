"""What the search over depths costs and finds: in lockstep against one subnet after another, and against all subsets.

Usage: python tests/benchmarks/depth_search.py [cost|regret|count] [--layers 12] [--min-depth 8] [--samples 20]
       [--length 256] [--exchanges 1] [--model demo|random] [--sublayers]

``cost`` prints layer-forwards and CPU seconds side by side; a layer-forward is one decoder layer run on one subnet's
states of one batch. ``regret`` measures every subset of layers that could go, and prints how far from the best one the
dynamic program, beams and exchanges end. ``count`` prints the layer-forwards of the paper's setting, without a model.

With ``--sublayers``, ``cost`` searches attention and MLP as units, and ``regret`` adds how far from the best set of
whole layers removing them apart ends (below 0: better than any), once with two sublayers removed for every layer, and
once with at least as many parameters removed as the layers have, as attention is smaller than an MLP.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from amoeba_plugin import demo
from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.models.sublayers import StandIns
from amoeba_plugin.runtime.module_calls import evaluating
from amoeba_plugin.selection.depth import search as depth
from amoeba_plugin.selection.depth.dynamic_program import Search, Table
from amoeba_plugin.selection.depth.lockstep_contract import Contract, check_contract
from amoeba_plugin.selection.depth.runner import runner_for
from amoeba_plugin.selection.depth.score_table import MeasuredTable
from amoeba_plugin.selection.depth.search import search_depths
from amoeba_plugin.selection.depth.steps import WHOLE, Removed
from amoeba_plugin.selection.depth.task import DepthTask, SearchOptions
from amoeba_plugin.selection.depth.walk import walk
from amoeba_plugin.selection.objectives import PerTokenLoss, Score

BATCH_SIZE = 8
MOST_SETS, SETS_AT_ONCE = 20_000, 500
Result = tuple[str, dict[int, float], int]  # name, loss above the best subset's by layers removed, subnets scored


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
    layers = tuple(adapter.layers(model))
    stand_ins = StandIns(adapter.sublayers(model.config), layers) if options.sublayers else None
    contract = check_contract(model, adapter, batches, stand_ins)
    found: list[DepthStrategy] = []
    for name, how in (("one by one", Contract("for comparison")), ("in lockstep", contract)):
        with mock.patch.object(depth, "check_contract", return_value=how):
            start = time.process_time()
            told = SearchOptions(exchanges=options.exchanges, granularity="sublayer" if options.sublayers else "layer")
            task = DepthTask(
                model, adapter, PerTokenLoss(), batches, min_depth=options.min_depth, progress=False, options=told
            )
            strategy = search_depths(task)
        took, seconds = strategy.search, time.process_time() - start
        forwards = round(took["layer_forwards"] / len(batches))
        calls = round(took.get("layer_calls", took["layer_forwards"]) / len(batches))
        print(f"{name:16}{took['measured']:9d}{forwards:16d}{calls:8d}{seconds:13.2f}")
        found.append(strategy)
    if (found[0].kept, found[0].lost) != (found[1].kept, found[1].lost):
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
        results, best = searches(model, batches, options.min_depth)
        if options.sublayers:
            results += sublayer_searches(model, batches, options.min_depth, best)
        for name, found, asked in results:
            rows.setdefault(name, []).append(found)
            subnets.setdefault(name, []).append(asked)
    layer = model.model.layers[0]
    print(f"parameters of an attention: {parameters(layer.self_attn):,}, of an MLP: {parameters(layer.mlp):,}\n")
    removed = list(rows["all subsets"][0])
    print(f"{'':44}{'subnets':>8}" + "".join(f"{f'-{count}':>10}" for count in removed))
    for name, each in rows.items():
        mean = {count: math.fsum(found[count] for found in each) / len(each) for count in removed}
        shown = "".join(f"{mean[count]:10.4f}" for count in removed)
        print(f"{name:44}{math.fsum(subnets[name]) / len(each):8.0f}{shown}")


def searches(model: PreTrainedModel, batches: Sequence[Batch], min_depth: int) -> tuple[list[Result], dict[int, float]]:
    """Return the ways to search, and the best subset's loss by layers removed."""
    adapter, objective = architecture_for("llama"), PerTokenLoss()
    layers = len(model.model.layers)
    candidates, most = layers - 1, layers - min_depth
    task = DepthTask(model, adapter, objective, batches, min_depth)
    with runner_for(task, batches, candidates) as runner, evaluating(model):
        everything = MeasuredTable(partial(runner.measure, objective, progress=lambda: None), {})
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
    return [*results, ("one random subset (mean of 20)", mean, 1)], best


def sublayer_searches(
    model: PreTrainedModel, batches: Sequence[Batch], min_depth: int, best: dict[int, float]
) -> list[Result]:
    """Return ways to search sublayers; ``best`` is the loss of the best subset of whole layers by their number."""
    adapter, objective = architecture_for("llama"), PerTokenLoss()
    layers = tuple(adapter.layers(model))
    candidates, most = 2 * (len(layers) - 1), 2 * (len(layers) - min_depth)
    deepest = min(candidates, most + 4)  # attentions are small: as many parameters are more of them
    sizes = [parameters(layers[0].self_attn), parameters(layers[0].mlp)]
    task = DepthTask(model, adapter, objective, batches, min_depth, options=SearchOptions(granularity="sublayer"))
    with runner_for(task, batches, candidates) as runner, evaluating(model):
        everything = MeasuredTable(partial(runner.measure, objective, progress=lambda: None), {})
        everything([WHOLE])
        results: list[Result] = []
        for beam, rounds in ((1, 0), (4, 0), (1, 1)):
            asked = MeasuredTable(everything, {})
            search = Search(asked, objective)
            table = search.exchange(search.shrink(candidates, deepest, beam), candidates, rounds)
            name = f"sublayers, beam {beam}" + ", 1 exchange" * rounds
            alike = {count: table[2 * count][1].value - best[count] for count in best}
            results.append((f"{name}: as many units", alike, len(asked.scores)))
            lean = {count: smallest_loss(table, sizes, count * sum(sizes)) - best[count] for count in best}
            results.append((f"{name}: as many parameters", lean, len(asked.scores)))
        sets = [Removed(s) for count in best for s in itertools.combinations(range(candidates), 2 * count)]
        if len(sets) <= MOST_SETS:
            for start in range(0, len(sets), SETS_AT_ONCE):
                everything(sets[start : start + SETS_AT_ONCE])
            found = {
                count: min(everything.scores[each].value for each in sets if len(each) == 2 * count) - best[count]
                for count in best
            }
            results.append(("all sets of sublayers: as many units", found, len(sets)))
    return results


def parameters(module: nn.Module) -> int:
    """Return how many there are in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def smallest_loss(table: Table, sizes: Sequence[int], least: int) -> float:
    """Return the best loss in a table among removals of at least so many parameters."""
    return min(score.value for removed, score in table.values() if sum(sizes[unit % 2] for unit in removed) >= least)


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
    parser.add_argument("--sublayers", action="store_true", help="attention and MLP apart")
    options = parser.parse_args()
    {"cost": cost, "regret": regret, "count": count}[options.what](options)


if __name__ == "__main__":
    main()
