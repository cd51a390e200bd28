"""What a SMOL adapter costs beside a plain LoRA of PEFT, as ratios in one run.

Every figure is CPU seconds of this process on one thread, so that a busy machine disturbs it little; the two things
compared take turns, each round gives one ratio, and the median of the ratios is printed with their quartiles. fp32.

* adapter: forward and backward of one layer, its adapter alone (the base layer's product, the same in all, is replaced
  by a constant tensor), for ``factors`` against a LoRA of rank r and ``outputs`` against one of rank k*r;
* step: forward, loss, backward and AdamW of a Llama with 8 layers of 512 channels, all linears adapted, against the
  LoRA of the same rank;
* router: the same step with the router asked once per forward, against once per layer as it is; gradient checkpointing
  and calls of a part of the model would then find its graph freed;
* memory: bytes saved for the backward pass of the same model beyond what the LoRA of the same rank saves, parameters
  not counted, at both numbers of tokens;
* shape: microseconds that ``set_shape`` takes on a model with 32 layers.

Prints a table with targets and verdicts; the exit code is 1 if a target was missed::

    python tests/benchmarks/smol_cost.py            # --rounds 5 --step-rounds 3: minutes
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from amoeba_plugin.runtime.module_calls import answering
from amoeba_plugin.smol import SmolConfig

RANK, EXPERTS, TOP_K = 64, 5, 2
WIDTHS, TOKENS = (512, 1024, 2048), (512, 4096)
SEQUENCE = 512
RANKS = {"factors": RANK, "outputs": TOP_K * RANK}  # of the LoRA that a mixture is at a fixed shape
ADAPTER_TARGETS = {"factors": 1.15, "outputs": 1.10}  # at 4096 tokens
STEP_TARGET = 1.05
SHAPE_TARGET_US = 1000.0


class Finding(NamedTuple):
    """One line of the table; ``limit`` is None where nothing is promised."""

    what: str
    value: str
    limit: str | None
    met: bool

    def __str__(self) -> str:
        verdict = "" if self.limit is None else f"{self.limit:>12}  {'ok' if self.met else 'MISSED'}"
        return f"{self.what:<58}{self.value:>32}{verdict}"


class FreeLinear(nn.Linear):
    """A linear layer that costs nothing: returns the same tensor again."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (tokens, in) to a constant (tokens, out)."""
        if not hasattr(self, "constant") or len(self.constant) != len(input):
            self.constant = input.new_zeros(len(input), self.out_features)
        return self.constant


def main() -> int:
    """Print all findings; return 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of the adapter alone")
    parser.add_argument("--step-rounds", type=int, default=5, help="of the whole model's step")
    parser.add_argument("--only", choices=("adapter", "step", "router", "memory", "shape"), help="one part of it")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "adapter": lambda: adapter_findings(settings.rounds),
        "step": lambda: step_findings(settings.step_rounds),
        "router": lambda: router_findings(settings.step_rounds),
        "memory": memory_findings,
        "shape": shape_findings,
    }
    missed = 0
    for name, part in parts.items():
        if settings.only in (None, name):
            for finding in part():
                print(finding, flush=True)
                missed += not finding.met
    print(f"{missed} targets missed" if missed else "all targets met")
    return 1 if missed else 0


def adapter_findings(rounds: int) -> Iterator[Finding]:
    """Compare the adapters of one layer."""
    for combination, limit in ADAPTER_TARGETS.items():
        for width in WIDTHS:
            for tokens in TOKENS:
                x, gradient = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
                runs = [layer_run(layer_model(width, c), x, gradient) for c in (combination, None)]
                if combination == "outputs":
                    runs[1] = layer_run(layer_model(width, None, TOP_K * RANK), x, gradient)
                what = f"adapter, {combination} / LoRA {RANKS[combination]}: width {width}, {tokens} tokens"
                yield ratio_finding(
                    what, *interleave(runs[0], runs[1], rounds), limit if tokens == max(TOKENS) else None
                )


def step_findings(rounds: int) -> Iterator[Finding]:
    """Compare training steps of a whole model."""
    for combination, rank in RANKS.items():
        for tokens in TOKENS:
            ids = torch.randint(1000, (tokens // SEQUENCE, SEQUENCE))
            runs = [step_run(llama(config), ids) for config in (smol(combination), lora(rank))]
            what = f"training step, {combination} / LoRA {rank}: {tokens} tokens"
            yield ratio_finding(what, *interleave(runs[0], runs[1], rounds), STEP_TARGET)


def router_findings(rounds: int) -> Iterator[Finding]:
    """Compare training steps that route once per forward with those that route in every layer."""
    for tokens in (64, SEQUENCE):
        ids = torch.randint(1000, (1, tokens))
        once, always = (llama(smol("factors")) for _ in range(2))
        what = f"training step, routed once / in every layer: {tokens} tokens"
        yield ratio_finding(what, *interleave(routed_once(once, ids), step_run(always, ids), rounds), None)


def routed_once(model: PeftModel, ids: Tensor) -> Callable[[], None]:
    """Return a training step in which the first layer's routing answers all others."""
    router, step = model.base_model.router, step_run(model, ids)
    route = router.forward

    def run() -> None:
        found: dict[str, Any] = {}
        with answering(router, lambda name: found[name] if name in found else found.setdefault(name, route(name))):
            step()

    return run


def memory_findings() -> Iterator[Finding]:
    """Compare what is saved for backward."""
    for combination, rank in RANKS.items():
        extra = []
        for tokens in TOKENS:
            ids = torch.randint(1000, (tokens // SEQUENCE, SEQUENCE))
            saved = [saved_bytes(llama(config), ids) for config in (smol(combination), lora(rank))]
            extra.append((saved[0] - saved[1]) / 2**20)
        value = " and ".join(f"{mib:.1f}" for mib in extra) + " MiB"
        what = f"saved beyond LoRA {rank}, {combination}: {' and '.join(map(str, TOKENS))} tokens"
        yield Finding(what, value, "the same", abs(extra[0] - extra[1]) < 0.1)


def shape_findings() -> Iterator[Finding]:
    """Time the change of shape."""
    depths = list(range(20, 33))
    model = llama(smol("factors", depths=depths, r=2), num_hidden_layers=32, hidden_size=64, intermediate_size=128)
    seconds = []
    for index in range(200):
        started = time.perf_counter()
        model.set_shape(f"{depths[index % len(depths)]}x{('1', '7/8')[index % 2]}")
        seconds.append(time.perf_counter() - started)
    microseconds = median(seconds) * 1e6
    what = "set_shape, 32 layers"
    yield Finding(what, f"{microseconds:.0f} us", f"<= {SHAPE_TARGET_US:.0f} us", microseconds <= SHAPE_TARGET_US)


def ratio_finding(what: str, ours: list[float], theirs: list[float], limit: float | None) -> Finding:
    """Summarise rounds of two things compared."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    value = f"{middle:.3f} ({low:.2f} to {high:.2f}), {median(theirs) * 1e3:.1f} ms"
    return Finding(what, value, None if limit is None else f"<= {limit}", limit is None or middle <= limit)


def interleave(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Run both in turns, in changing order; return CPU seconds of each round."""
    runs, seconds = (ours, theirs), ([], [])
    for run in runs:
        run()
    for number in range(max(rounds, 2)):
        for which in ((0, 1), (1, 0))[number % 2]:
            started = time.process_time()
            runs[which]()
            seconds[which].append(time.process_time() - started)
    return seconds


def smol(combination: str, **fields: Any) -> SmolConfig:
    """Return SMOL's configuration with the paper's sizes."""
    settings = dict(r=RANK, num_experts=EXPERTS, top_k=TOP_K, widths=["1", "7/8"], init_weights=False)
    return SmolConfig(combination=combination, target_modules="all-linear", **(settings | fields))


def lora(rank: int) -> LoraConfig:
    """Return the configuration of a plain LoRA."""
    return LoraConfig(r=rank, init_lora_weights=False, target_modules="all-linear")


def layer_model(width: int, combination: str | None, rank: int = RANK) -> PeftModel:
    """Return one adapted layer: SMOL, or LoRA where there is no combination."""
    config: Any = lora(rank) if combination is None else smol(combination)
    config.target_modules = {"0"}
    return get_peft_model(nn.Sequential(FreeLinear(width, width)), config).train()


def layer_run(model: PeftModel, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return forward and backward of one layer."""

    def run() -> None:
        model.zero_grad()
        x.grad = None
        model(x).backward(gradient)

    return run


def llama(config: Any, **changes: Any) -> PeftModel:
    """Return an adapted random Llama."""
    sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, vocab_size=4096)
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**(sizes | changes))), config).train()


def step_run(model: PeftModel, ids: Tensor) -> Callable[[], None]:
    """Return a training step."""
    # fused, as transformers.Trainer takes it by default
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return run


def saved_bytes(model: PeftModel, ids: Tensor) -> int:
    """Count the bytes that one forward saves for its backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive = []  # a freed storage's address would be counted as the next one's

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(storages.values())
    loss.backward()
    return total


if __name__ == "__main__":
    sys.exit(main())
