"""Which shapes draft for which, measured: answers of the larger one, drafted and alone, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from amoeba_plugin.data.text import load_batches
from amoeba_plugin.deployment.profiling.profile import DraftedPair, Drafting, Profile
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import ELASTIC_NAME, read_record
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.serving.backend import Backend, TorchBackend
from amoeba_plugin.serving.drafting import AHEAD, DraftingBackend
from amoeba_plugin.serving.feasible import profiled
from amoeba_plugin.shape import ShapeSpace, SubnetShape

POINT = "torch:elastic"
MOST_SHARE = 0.6  # of the larger shape's time per token: what takes more cannot gain
PROMPT, PROMPTS = 48, 4  # tokens of a prompt, and prompts


@dataclass(frozen=True)
class Trial:
    """How pairs are measured.

    Attributes:
        prompts: Tokens of each.
        answer: Tokens of each answer.
        rounds: In which both ways take turns; the least time of each prompt counts.
        ahead: Tokens that are drafted at most.
        clock: In seconds; of the process's CPU where one thread computes, which other processes do not lengthen.
    """

    prompts: Sequence[Sequence[int]]
    answer: int = 32
    rounds: int = 3
    ahead: int = AHEAD
    clock: Callable[[], float] = time.process_time


def measure_pair(live: ElasticModel, drafter: SubnetShape, target: SubnetShape, trial: Trial) -> DraftedPair:
    """Answer prompts by a shape alone and with another one drafting for it, greedily, in turns."""
    alone, drafted = TorchBackend(live), DraftingBackend(live, {target: drafter}, trial.ahead)
    took: dict[Backend, list[float]] = {each: [float("inf")] * len(trial.prompts) for each in (alone, drafted)}
    for _ in range(trial.rounds):
        for number, prompt in enumerate(trial.prompts):
            for backend, least in took.items():
                least[number] = min(least[number], _answered(backend, target, prompt, trial))
    tokens = (trial.answer - 1) * len(trial.prompts)  # the first is the prompt's
    counts = drafted.counts
    return DraftedPair(
        drafter=str(drafter), target=str(target), acceptance=counts.accepted / max(counts.drafted, 1),
        alone=tokens / sum(took[alone]), drafted=tokens / sum(took[drafted]),
    )  # fmt: skip


def hopeful(space: ShapeSpace, seconds: Callable[[SubnetShape], float]) -> list[tuple[SubnetShape, SubnetShape]]:
    """Return pairs of a drafter and what it may draft for: those whose drafter takes little enough time per token."""
    return [
        (drafter, target) for target in space for drafter in space if seconds(drafter) <= MOST_SHARE * seconds(target)
    ]


def require_elastic(model: Path, points: Sequence[str]) -> None:
    """Refuse to measure drafting of anything but an elastic checkpoint in torch, before anything is measured.

    Raises:
        DeploymentError: If it is none, or the flow is not among those that are profiled.
    """
    if not (model / ELASTIC_NAME).is_file() or POINT not in points:
        raise DeploymentError(
            f"shapes draft for each other in an elastic model: write amoeba profile ELASTIC --flow {POINT} --drafting "
            f"TEXT, with an elastic checkpoint; {model} in {', '.join(points)} is something else"
        )


def measure_drafting(elastic: Path, path: Path, dataset: str, base: str | None = None, ahead: int = AHEAD) -> Profile:
    """Measure drafting of an elastic checkpoint, with its own weights, into its profile.

    Args:
        elastic: The checkpoint.
        path: Of its profile, which knows what shapes take in ``torch:elastic``.
        dataset: Text that looks like what the model will read.
        base: Where the checkpoint's base is now, if it moved.
        ahead: Tokens that are drafted at most.

    Raises:
        DataError: If the text cannot be read, or is too short.
    """
    profile = Profile.load(path)
    threads, latency_of = profile.flows[POINT].threads, profiled(profile, POINT)
    live, _ = load_elastic(elastic, base)
    prompts = _prompts(live, base or read_record(elastic).base_of(elastic), dataset)
    torch.set_num_threads(threads)
    trial = Trial(prompts, ahead=ahead, clock=time.process_time if threads == 1 else time.perf_counter)
    pairs = hopeful(live.space, lambda shape: latency_of(shape, PROMPT).tpot)
    measured = [measure_pair(live, *pair, trial) for pair in tqdm(pairs, desc="drafting", unit="pair", leave=False)]
    profile.drafting = Drafting(fingerprint=live.strategy.fingerprint, ahead=ahead, pairs=measured)
    profile.save(path)
    return profile


def drafters_of(profile: Profile, live: ElasticModel) -> Mapping[SubnetShape, SubnetShape]:
    """Return which shape drafts for which by a profile: the best one where it gained; none of other weights."""
    drafting = profile.drafting
    if drafting is None or drafting.fingerprint != live.strategy.fingerprint:
        return {}
    return {live.space.require(one): live.space.require(other) for one, other in drafting.drafters().items()}


def _answered(backend: Backend, shape: SubnetShape, prompt: Sequence[int], trial: Trial) -> float:
    """Return the seconds of an answer behind its first token."""
    cache, logits = backend.prefill(shape, prompt)
    token = int(logits.argmax())
    begun = trial.clock()
    for _ in range(trial.answer - 1):
        token = int(backend.step(shape, cache, token).argmax())
    return trial.clock() - begun


def _prompts(live: ElasticModel, base: str, dataset: str) -> list[list[int]]:
    batches = load_batches(
        dataset, load_tokenizer(base), split="train", num_samples=PROMPTS, max_seq_length=PROMPT, batch_size=1,
        vocab_size=live.model.config.vocab_size, seed=0,
    )  # fmt: skip
    return [batch["input_ids"][0].tolist() for batch in batches]
