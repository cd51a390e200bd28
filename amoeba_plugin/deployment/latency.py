"""Measured latency of ordinary models: prefill and per-token decoding, never estimated from FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from amoeba_plugin.runtime.compat import cache_name

PROMPT_TOKENS, DECODE_TOKENS = 192, 16


@dataclass(frozen=True)
class Latency:
    """Median wall-clock milliseconds: one prefill of the prompt, and one decoded token after it."""

    prefill_ms: float
    decode_ms: float


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, PreTrainedModel],
    prompt_tokens: int = PROMPT_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
    rounds: int = 5,
) -> dict[str, Latency]:
    """Measure models against each other: rounds are interleaved, so that a busy machine slows all of them alike.

    Args:
        models: By name; in evaluation mode.
        prompt_tokens: Length of the prompt, batch 1.
        decode_tokens: Tokens decoded after it with the KV cache, greedily.
        rounds: Measured rounds; one more is thrown away.
    """
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(rounds + 1), desc="latency", unit="round", leave=False):
        for name, model in models.items():
            first, rest = _one_run(model, prompt_tokens, decode_tokens)
            prefill[name].append(first)
            decode[name].append(rest / decode_tokens)
    return {name: Latency(statistics.median(prefill[name][1:]), statistics.median(decode[name][1:])) for name in models}


def _one_run(model: PreTrainedModel, prompt_tokens: int, decode_tokens: int) -> tuple[float, float]:
    tokens = torch.arange(prompt_tokens, device=model.device)[None] % model.config.vocab_size
    started = _now(model)
    output, cache = model(tokens, use_cache=True), cache_name(model)
    prefilled = _now(model)
    for _ in range(decode_tokens):
        tokens = output.logits[:, -1:].argmax(-1)
        output = model(tokens, use_cache=True, **{cache: getattr(output, cache)})
    return (prefilled - started) * 1e3, (_now(model) - prefilled) * 1e3


def _now(model: PreTrainedModel) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
