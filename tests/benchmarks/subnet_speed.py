"""Whether extracted subnets are as much faster than the dense model as they have fewer multiplications.

Usage: python tests/benchmarks/subnet_speed.py [--hidden 1024] [--layers 8] [--tokens 512] [--steps 16] [--rounds 5]

A random Llama (fp32, one thread, a small vocabulary so that the decoder layers are all there is). Subnets are extracted
and run as the stock classes they are. Prefill reads `tokens` tokens; decode continues by `steps` single tokens with
a cache of that length. In every round all shapes take their turn, so that a slow minute hits all alike; what is printed
are medians of CPU time (process_time: what other processes take does not count), and the ratio to the dense model's.
FLOPs are those of the decoder layers: 2 per weight and token, plus 4 * heads * head size per pair of tokens.

Where products of matrices are nearly all there is to do, the ratio of times is that of FLOPs: in prefill at hidden 1024
and 512 tokens, where each takes 2.5e8 multiplications or more. Smaller models spend a share on norms, rotations and
calls that does not shrink with the width. Decode multiplies matrices by one vector: it reads every weight once a token,
so memory bounds it, and it follows FLOPs only because bytes and FLOPs shrink alike; what does not shrink counts more.
CPU time does not leave other processes out there: those that read memory too make this one wait. Compare decode at
hidden 2048 and on a quiet machine. The last line of each table is the largest deviation of all shapes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for

WIDTHS = (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(1, 2))


def elastic_model(hidden: int, layers: int) -> ElasticModel:
    """Return a random elastic Llama with heads of 64 channels."""
    heads = hidden // 64
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64,
        intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, vocab_size=512, max_position_embeddings=4096,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    adapter = architecture_for("llama")
    groups = [(layer, group) for layer in range(layers) for group in adapter.channel_groups(config)]
    order = {group_key(layer, group): torch.arange(group.units) for layer, group in groups}
    units = {width: {group_key(layer, group): int(group.units * width) for layer, group in groups} for width in WIDTHS}
    depth = DepthStrategy({count: tuple(range(count)) for count in range(1, layers + 1)})
    strategy = SubnetStrategy(depth, WidthStrategy(units, order), model_fingerprint(model, adapter))
    return ElasticModel(model, strategy)


def layer_flops(model: PreTrainedModel, new: int, past: int) -> int:
    """Return the multiplications and additions of the decoder layers for ``new`` tokens behind ``past`` others."""
    config = model.config
    weights = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear))
    pairs = sum(past + position + 1 for position in range(new))
    channels = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * weights * new + 4 * channels * pairs


@torch.no_grad()
def prefill(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the CPU seconds of reading a prompt."""
    started = time.process_time()
    model.model(tokens, use_cache=False)
    return time.process_time() - started


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: torch.Tensor, steps: int) -> float:
    """Return the CPU seconds per token of continuing a prompt."""
    cache = DynamicCache(config=model.config)
    model.model(tokens, past_key_values=cache, use_cache=True)
    started = time.process_time()
    for _ in range(steps):
        model.model(tokens[:, :1], past_key_values=cache, use_cache=True)
    return (time.process_time() - started) / steps


def medians(
    models: dict[str, PreTrainedModel], run: Callable[[PreTrainedModel], float], rounds: int
) -> dict[str, float]:
    """Return the median of each model's figure over interleaved rounds; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            figure = run(model)
            if number:
                taken[name].append(figure)
    return {name: statistics.median(figures) for name, figures in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    elastic = elastic_model(options.hidden, options.layers)
    fewer = options.layers * 3 // 4
    shapes = [f"{options.layers}x1", f"{options.layers}x7/8", f"{options.layers}x3/4", f"{options.layers}x1/2",
              f"{fewer}x1", f"{fewer}x3/4", f"{options.layers // 2}x1/2"]  # fmt: skip
    models = {shape: extract(elastic, shape) for shape in shapes}
    tokens = torch.randint(512, (1, options.tokens))
    print(f"hidden {options.hidden}, {options.layers} layers, {options.tokens} tokens, {options.rounds} rounds")
    for name, run, new, past in (
        ("prefill", lambda model: prefill(model, tokens), options.tokens, 0),
        ("decode", lambda model: decode(model, tokens, options.steps), 1, options.tokens + options.steps // 2),
    ):
        found = medians(models, run, options.rounds)
        flops = {shape: layer_flops(model, new, past) for shape, model in models.items()}
        print(f"\n{name:<10}{'class':<22}{'ms':>9}{'time':>8}{'FLOPs':>8}{'time / FLOPs':>14}")
        ratios = []
        for shape, model in models.items():
            times, work = found[shape] / found[shapes[0]], flops[shape] / flops[shapes[0]]
            ratios.append(times / work)
            row = f"{shape:<10}{type(model).__name__:<22}{found[shape] * 1e3:9.1f}"
            print(f"{row}{times:8.3f}{work:8.3f}{times / work:14.3f}")
        worst = max(ratios, key=lambda ratio: abs(ratio - 1))
        print(f"{name} is off its FLOPs by {worst - 1:+.0%} at most")


if __name__ == "__main__":
    main()
