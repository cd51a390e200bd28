"""The data of a profile: what was measured, of which model, by which engine, on which machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from transformers import PretrainedConfig

from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.documents import Document, Part

SURELY = 1.05  # by which drafting must be faster: repeated measurements differ by less
BUSY = 0.95  # of CPU time to wall time, at one thread: below it something else computed, too
CPU_INFO, CPU_NAME = Path("/proc/cpuinfo"), "model name"
NOT_OF_SIZE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


class Seconds(Part):
    """How long something took: by the clock, and of all CPUs."""

    wall: float
    cpu: float

    @property
    def busy(self) -> bool:
        """Whether something else computed on the CPU of one thread."""
        return self.cpu < BUSY * self.wall

    def at_speed(self, known: Seconds, now: Seconds) -> Seconds:
        """Return what this would have taken when something else, which takes so much now, took what is known of it."""
        return Seconds(wall=self.wall * known.wall / now.wall, cpu=self.cpu * known.cpu / now.cpu)

    def least(self, other: Seconds) -> Seconds:
        """Return the shorter by each clock."""
        return Seconds(wall=min(self.wall, other.wall), cpu=min(self.cpu, other.cpu))


class Round(Part):
    """One visit of one process to one shape.

    Attributes:
        load: Of the file.
        prefill: By prompt length, of one prompt of each of the batch.
        decode: Of one token of each.
        peak: Bytes resident at most.
    """

    load: Seconds
    prefill: dict[int, Seconds]
    decode: Seconds
    peak: int

    def at_speed(self, known: Round, now: Round) -> Round:
        """Return the times of this visit at the speed that the machine had when another shape took what is known of it.

        Args:
            known: The least that the other shape took, at some of the lengths of ``now``.
            now: What it takes in the same process as this visit.
        """
        lengths = known.prefill.keys() & now.prefill.keys()
        prefill = {}
        for tokens, taken in self.prefill.items():
            near = min(lengths, key=lambda each: abs(each - tokens))
            prefill[tokens] = taken.at_speed(known.prefill[near], now.prefill[near])
        return self.model_copy(update={"prefill": prefill, "decode": self.decode.at_speed(known.decode, now.decode)})


class ShapeCost(Part):
    """What a shape costs, by all rounds.

    Attributes:
        work: Its sizes: sublayers, heads, neurons.
        bytes: Of its files.
        rounds: Each of another process.
    """

    work: tuple[int, int, int]
    bytes: int
    rounds: list[Round] = Field(default_factory=list)

    @property
    def least(self) -> Round:
        """The least times of all rounds, as one round."""
        found, *others = self.rounds
        for each in others:
            prefill = {**each.prefill, **found.prefill}
            prefill |= {tokens: prefill[tokens].least(took) for tokens, took in each.prefill.items()}
            found = found.model_copy(update={"prefill": prefill, "decode": found.decode.least(each.decode)})
        return found

    def rounds_of(self, prompts: Collection[int]) -> int:
        """Return how many rounds had prompts of all these lengths."""
        return sum(set(prompts) <= each.prefill.keys() for each in self.rounds)


class FlowProfile(Part):
    """What shapes cost in one flow at one scheme.

    Attributes:
        engine: Its name and version, as it says.
        threads: That computed.
        batch: Prompts at a time.
        decoded: Tokens behind the longest prompt whose time is that of decoding.
        shapes: By what they are called.
        adapted: The adapter that an elastic model computed with, in words; empty: none did.
    """

    engine: dict[str, str]
    threads: int
    batch: int
    decoded: int
    shapes: dict[str, ShapeCost] = Field(default_factory=dict)
    adapted: str = ""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that a shape was measured with; 0: none was measured."""
        rounds = [each for cost in self.shapes.values() for each in cost.rounds]
        return max((tokens for each in rounds for tokens in each.prefill), default=0)

    def require_adapted(self, adapted: str, path: Path) -> None:
        """Refuse times of an elastic model with another adapter, or with none, which is faster than any.

        Args:
            adapted: The adapter, in words; empty: there is none.
            path: Of the profile.

        Raises:
            ArtifactError: If it is another.
        """
        if self.adapted != adapted:
            raise ArtifactError(
                f"{path} was measured with {self.adapted or 'no adapter'}, and the elastic checkpoint has "
                f"{adapted or 'none'}: its times are not those of this model; name another file, or delete this one"
            )

    def seconds(self, of: Seconds) -> float:
        """Return what counts: at one thread the CPU's time, which other processes do not lengthen."""
        return of.cpu if self.threads == 1 else of.wall

    @property
    def busy(self) -> bool:
        """Whether the machine computed something else for most of the time, so that wall times say little."""
        told = [each.decode.busy for cost in self.shapes.values() for each in cost.rounds]
        return self.threads == 1 and bool(told) and statistics.mean(told) > 0.5


class DraftedPair(Part):
    """A shape that decoded with another one drafting for it, and alone, in turns.

    Attributes:
        drafter: The smaller shape.
        target: The larger one, whose tokens they are.
        acceptance: Share of what was drafted that was what the larger one said.
        alone: Tokens per second of the larger one by itself.
        drafted: Tokens per second of both.
    """

    drafter: str
    target: str
    acceptance: float
    alone: float
    drafted: float

    @property
    def gains(self) -> bool:
        """Whether drafting was faster, by more than measurements differ."""
        return self.drafted > SURELY * self.alone


class Drafting(Part):
    """Which shapes draft for which, measured with a model's own weights on somebody's text.

    Attributes:
        fingerprint: Of the weights of its base model.
        ahead: Tokens that were drafted at most.
        pairs: That were measured.
    """

    fingerprint: str
    ahead: int
    pairs: list[DraftedPair]

    def drafters(self) -> dict[str, str]:
        """Return the best drafter of every shape that gains from one, by that shape."""
        best: dict[str, DraftedPair] = {}
        for pair in self.pairs:
            if pair.gains and (pair.target not in best or pair.drafted > best[pair.target].drafted):
                best[pair.target] = pair
        return {target: pair.drafter for target, pair in best.items()}


class Profile(Document):
    """What shapes of a model cost on a machine.

    Attributes:
        version: Of the document.
        model: Its name.
        digest: Of its configuration, without names and versions.
        sizes: Work of every shape of the space, by its name.
        machine: What it is; a profile of another one says nothing of this.
        flows: By ``flow:scheme``.
        drafting: Of the elastic model; ``None``: it was not measured.
    """

    what: ClassVar[str] = "a profile"
    version: Literal[1] = 1
    model: str
    digest: str
    sizes: dict[str, tuple[int, int, int]]
    machine: dict[str, str]
    flows: dict[str, FlowProfile] = Field(default_factory=dict)
    drafting: Drafting | None = None

    @property
    def works(self) -> Mapping[str, Work]:
        """Work by shape."""
        return {shape: Work(*sizes) for shape, sizes in self.sizes.items()}

    @classmethod
    def load(cls, path: Path, foreign: bool = False) -> Profile:
        """Read a profile.

        Args:
            path: Of the file.
            foreign: It may be of another machine.

        Raises:
            ArtifactError: If it is none, of another version, or of another machine.
        """
        if not path.exists():
            raise ArtifactError(f"there is no profile {path}; amoeba profile MODEL --flow FLOW -o {path} makes it")
        found = super().load(path)
        if found.machine != this_machine() and not foreign:
            raise ArtifactError(
                f"{path} is of another machine ({', '.join(found.machine.values())}), and this is "
                f"{', '.join(this_machine().values())}; profile here, or take it with --foreign"
            )
        return found


def this_machine() -> dict[str, str]:
    """Return what identifies this machine: its CPU, how many of them, its system."""
    lines = CPU_INFO.read_text(errors="replace").splitlines() if CPU_INFO.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith(CPU_NAME)), platform.processor())
    return {"cpu": named or platform.machine(), "cpus": str(os.cpu_count()), "system": platform.system()}


def config_digest(config: PretrainedConfig) -> str:
    """Return what identifies a model's sizes, whatever its weights are."""
    told = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_SIZE}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
