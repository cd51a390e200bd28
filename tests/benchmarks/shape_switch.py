"""How long a switch of shape takes, with repaired weights and without, beside a forward of one token; fp32, one thread.

A Llama of SmolLM2-135M's sizes with random weights, depths 30, 24 and 20, widths 1, 3/4 and 1/2. The two models take
turns; medians are printed. The exit code is 1 if a switch takes more than a millisecond, or copies a weight::

    python tests/benchmarks/shape_switch.py            # a minute; --rounds 200
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from fractions import Fraction
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import Place, Repairs
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.models.adapter import group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_for

DEPTHS, WIDTHS = (30, 24, 20), tuple(Fraction(n, 4) for n in (4, 3, 2))
TARGET_MS = 1.0


def elastic_model(repaired: bool) -> ElasticModel:
    """Return a model whose every narrow width, and every depth, has weights of its own, or none has."""
    config = LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=12, num_key_value_heads=4,
        head_dim=48, vocab_size=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model, adapter = LlamaForCausalLM(config).eval(), architecture_for("llama")
    keyed = {group_key(index, group): group for index in range(30) for group in adapter.channel_groups(config)}
    units = {width: {key: int(group.units * width) for key, group in keyed.items()} for width in WIDTHS}
    depth = DepthStrategy({count: tuple(range(count)) for count in DEPTHS})
    width = WidthStrategy(units, {key: torch.randperm(group.units) for key, group in keyed.items()})
    weights: dict[Place, dict[str, Tensor]] = {}
    for place in [(count, share) for count in (None, *DEPTHS[1:]) for share in WIDTHS if count or share != 1]:
        weights[place] = {
            key: torch.randn(576, units[place[1]][key] * group.consumer.channels_per_unit)
            for key, group in keyed.items()
            if place[0] is None or key == f"{place[0] - 1}.mlp"
        }
    repairs = Repairs(weights, "random") if repaired else Repairs()
    return ElasticModel(model, SubnetStrategy(depth, width, model_fingerprint(model, adapter), repairs=repairs))


def pointers(elastic: ElasticModel) -> Mapping[str, int]:
    """Return where every weight is, held ones too."""
    both = (*elastic.model.named_parameters(), *elastic.model.named_buffers())
    return {name: each.data_ptr() for name, each in both}


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    models = {"as cut": elastic_model(False), "repaired": elastic_model(True)}
    before = {name: pointers(elastic) for name, elastic in models.items()}
    switch: dict[str, list[float]] = {name: [] for name in models}
    token: dict[str, list[float]] = {name: [] for name in models}
    shapes = [f"{depth}x{width}" for depth in DEPTHS for width in WIDTHS]
    for number in range(rounds):
        for name, elastic in models.items():
            begun = time.perf_counter()
            elastic.set_shape(shapes[number * 4 % len(shapes)])
            switch[name].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            with torch.inference_mode():
                elastic.model(torch.tensor([[1]]))
            token[name].append(time.perf_counter() - begun)
    failed = False
    for name, elastic in models.items():
        elastic.set_shape("30x1")
        copied = pointers(elastic) != before[name]
        milliseconds = median(switch[name]) * 1e3
        failed |= copied or milliseconds > TARGET_MS
        print(
            f"{name:<10} switch {milliseconds:.2f} ms, a token {median(token[name]) * 1e3:.1f} ms; "
            f"{'weights were copied' if copied else 'nothing copied'}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
