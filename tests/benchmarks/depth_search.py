"""What the dynamic program over layers costs on a model of the demo's size: seconds, evaluations, layer-forwards.

Usage: python tests/benchmarks/depth_search.py [--layers 12] [--min-depth 6] [--samples 32] [--length 256]

A layer-forward is one decoder layer run on one batch. "from the start" runs every candidate from its embeddings, as the
reference code does; "resumed" is what ``search_depths`` does: layers before the first removed one are run once. Both
find the same strategy; the benchmark stops if they do not.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from amoeba_plugin import depth
from amoeba_plugin.calibration import Batch, materialise
from amoeba_plugin.depth import search_depths
from amoeba_plugin.objectives import PerTokenLoss
from amoeba_plugin.plugins import architecture_for
from amoeba_plugin.strategy import DepthStrategy

VOCABULARY, BATCH_SIZE = 4096, 8


def demo_like_model(layers: int) -> PreTrainedModel:
    """Return a random Llama of the demo's sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def search(layers: int, min_depth: int, batches: list[Batch], resumable: bool) -> tuple[DepthStrategy, float, int]:
    """Return what is found, seconds, and layer-forwards."""
    model = demo_like_model(layers)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    for layer in model.model.layers:
        layer.register_forward_hook(count)
    with mock.patch.object(depth, "_takes_states", return_value=resumable):
        start = time.perf_counter()
        found = search_depths(
            model, architecture_for("llama"), PerTokenLoss(), batches, min_depth=min_depth, progress=False
        )
        return found, time.perf_counter() - start, forwards


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--min-depth", type=int, default=6)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    ids = torch.randint(0, VOCABULARY, (options.samples, options.length), generator=torch.Generator().manual_seed(1))
    batches = materialise({"input_ids": part} for part in ids.split(BATCH_SIZE))
    candidates, most = options.layers - 1, options.layers - options.min_depth
    evaluations = candidates * most - most * (most - 1) // 2
    print(
        f"{options.layers} layers to {options.min_depth}, last one kept: {evaluations} evaluations of "
        f"{options.samples} x {options.length} tokens in {len(batches)} batches, {torch.get_num_threads()} thread(s)\n"
    )
    print(f"{'':16}{'seconds':>9}{'layer-forwards':>16}{'per evaluation and batch':>26}")
    found = []
    for name, resumable in (("from the start", False), ("resumed", True)):
        strategy, seconds, forwards = search(options.layers, options.min_depth, batches, resumable)
        found.append(strategy)
        print(f"{name:16}{seconds:9.2f}{forwards:16d}{forwards / evaluations / len(batches):26.2f}")
    if found[0] != found[1]:
        raise SystemExit("the two strategies differ")


if __name__ == "__main__":
    main()
