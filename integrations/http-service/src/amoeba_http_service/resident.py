"""An elastic model made ready: its profile, which is measured first where there is none, its weights, its worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from amoeba_http_service.settings import Limits
from amoeba_plugin.deployment.profiling.asked import flows_of, prompts_of, subject_of
from amoeba_plugin.deployment.profiling.measure import Measuring, profile_model
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.search.preflight import require_of
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.record import read_record
from amoeba_plugin.errors import ArtifactError, ServiceError
from amoeba_plugin.runtime.messages import say
from amoeba_plugin.serving.backend import TorchBackend
from amoeba_plugin.serving.compact.files import load_compact
from amoeba_plugin.serving.deciders import Decider, DeciderOptions
from amoeba_plugin.serving.drafted_pairs import drafters_of
from amoeba_plugin.serving.drafting import DraftingBackend
from amoeba_plugin.serving.feasible import LatencyOf, profiled
from amoeba_plugin.serving.files import FilesBackend
from amoeba_plugin.serving.registry import decider_named
from amoeba_plugin.serving.service import ElasticService
from amoeba_plugin.serving.slo import Latency
from amoeba_plugin.serving.texts import Texts
from amoeba_plugin.shape import ShapeSpace

FLOW = "torch:elastic"
SHAPES, ROUNDS = 6, 2  # that a first profile measures, so that it takes a minute or two


@dataclass(frozen=True)
class How:
    """How a model is made resident.

    Attributes:
        profile: File of the profile; made, or extended, where it does not know the flow.
        decider: Name of what decides; ``None``: the compact model, where there is one, else the largest feasible.
        shape: Of the decider ``fixed``.
        decisions: Directory of a compact model, which ``amoeba tune-decisions`` made.
        threads: That compute; ``None``: those of the profile, of a new one 1.
        base: Where the base model is now, if it moved.
        drafts: Let small shapes draft for larger ones where the profile says that they gain from it; ``None``: where
            that can be.
        context: Of files: tokens that a prompt and its answer may have together; ``None``: what the model has
            positions for, but not endlessly many.
    """

    profile: Path
    decider: str | None = None
    shape: str | None = None
    decisions: Path | None = None
    threads: int | None = None
    base: str | None = None
    drafts: bool | None = None
    context: int | None = None


@dataclass(frozen=True)
class Resident:
    """A model that answers.

    Attributes:
        name: Of the model, for clients.
        service: Takes requests.
        backend: Computes them.
        tokenizer: Of the model.
        latency_of: What shapes take, by the profile.
        ends: Tokens that end an answer.
    """

    name: str
    service: ElasticService
    backend: TorchBackend | DraftingBackend | FilesBackend
    tokenizer: PreTrainedTokenizerBase
    latency_of: LatencyOf
    ends: frozenset[int]

    @property
    def space(self) -> ShapeSpace:
        """The shapes that requests may get."""
        return self.backend.space

    @property
    def texts(self) -> Texts:
        """Makes prompts."""
        return Texts(self.tokenizer)

    def whole(self, tokens: int) -> Latency:
        """Return what the whole model takes on so many tokens of prompt."""
        return self.latency_of(self.space.largest, tokens)


def make_resident(elastic: Path, how: How, limits: Limits) -> Resident:
    """Load an elastic checkpoint, and start its worker.

    Args:
        elastic: The checkpoint.
        how: Profile, decider, threads.
        limits: Of which the requests that wait count.

    Raises:
        ArtifactError: If the checkpoint or the profile is none, damaged, or of another model or machine.
        ServiceError: If it is asked for what only files have.
        ShapeError: If the decider's shape is none of the model's.
    """
    if how.context is not None:
        raise ServiceError(
            "--context is of deployed files, whose engines keep room for so many tokens; an elastic model has its own "
            "positions: leave it out, or shorten prompts by --max-prompt"
        )
    base = how.base or read_record(elastic).base_of(elastic)
    subject = subject_of(str(elastic), None, [], [], how.base)
    decider = decider_of(how, subject.space)
    profile = profile_for_service(subject, how, str(elastic))
    torch.set_num_threads(profile.flows[FLOW].threads)
    tokenizer = _tokenizer(base, elastic)
    live, _ = load_elastic(elastic, how.base)
    if live.model.dtype != torch.float32 and live.model.device.type == "cpu":
        live.model.float()  # what the profile measured
    reader = None if how.decisions is None else load_compact(how.decisions, live, tokenizer)[0]
    backend, latency_of = _backend(live, profile, how), profiled(profile, FLOW)
    service = ElasticService(backend, latency_of, decider, reader, most_waiting=limits.waiting)
    return Resident(elastic.resolve().name, service, backend, tokenizer, latency_of, _ends(live.model, tokenizer))


def _backend(live: ElasticModel, profile: Profile, how: How) -> TorchBackend | DraftingBackend:
    drafters = {} if how.drafts is False else drafters_of(profile, live)
    if not drafters or profile.drafting is None:
        return TorchBackend(live)
    say(f"small shapes draft for {', '.join(map(str, drafters))}, as the profile says")
    return DraftingBackend(live, drafters, profile.drafting.ahead)


def decider_of(how: How, space: ShapeSpace) -> Decider:
    """Return what decides which of the feasible shapes a request gets."""
    shape = None if how.shape is None else space.require(how.shape)
    name = how.decider or ("largest_feasible" if how.decisions is None else "dual_head")
    if shape is not None and name != "fixed":
        raise ServiceError(f"--shape {shape} is of --decider fixed, and {name} decides; leave one of them out")
    if name == "dual_head" and how.decisions is None:
        raise ServiceError(
            "dual_head decides by a compact model; name it by --decisions DIR: amoeba tune-decisions makes it"
        )
    return decider_named(name, DeciderOptions(shape=shape))


def profile_for_service(subject: Subject, how: How, name: str, progress: bool = True) -> Profile:
    """Return a profile that knows what every shape of a model takes as a service runs it; what is missing is measured.

    Args:
        subject: The model and its space.
        how: File and threads.
        name: Of the model, for people.
        progress: Show a progress bar.

    Raises:
        ArtifactError: If the file is of another model or machine, or was measured with other threads.
    """
    known = require_of(Profile.load(how.profile), how.profile, subject) if how.profile.exists() else None
    flow = None if known is None else known.flows.get(FLOW)
    if flow is not None and how.threads not in (None, flow.threads):
        raise ArtifactError(
            f"{how.profile} was measured with {flow.threads} threads, and --threads asks for {how.threads}; name "
            "another file by --profile, or leave --threads out"
        )
    if flow is not None:
        flow.require_adapted(subject.adapted_by, how.profile)
    if (
        known is not None
        and flow is not None
        and flow.shapes
        and {str(shape) for shape in subject.space} <= known.sizes.keys()
    ):
        return known
    say(f"measuring what shapes take on this machine, once; it will be in {how.profile}")
    measuring = Measuring(rounds=ROUNDS, threads=how.threads or 1, shapes=min(SHAPES, len(subject.space)))
    lengths = prompts_of([], subject, measuring.decoded)
    measuring = Measuring(lengths, measuring.decoded, ROUNDS, measuring.threads, shapes=measuring.shapes)
    return profile_model(subject, flows_of([FLOW]), how.profile, measuring, name, progress)


def _tokenizer(base: str, elastic: Path) -> PreTrainedTokenizerBase:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the base model '{base}' of {elastic} has no tokenizer that can be loaded ({error}); put its "
            "tokenizer.json there, or say by --base where a model with one is"
        ) from error
    return found


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer, by the model's generation defaults and the tokenizer."""
    told = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = told if isinstance(told, list) else [told]
    return frozenset(int(each) for each in (*listed, tokenizer.eos_token_id) if each is not None)
