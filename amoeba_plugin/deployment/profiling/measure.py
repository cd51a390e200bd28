"""Measuring: every round is a process of its own, which visits all shapes; what is known is not measured again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.flow import DeploymentFlow, Point
from amoeba_plugin.deployment.profiling.profile import (
    FlowProfile,
    Profile,
    Round,
    Seconds,
    ShapeCost,
    config_digest,
    this_machine,
)
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work, telling
from amoeba_plugin.deployment.tokenizers import mended
from amoeba_plugin.errors import ArtifactError, DeploymentError
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.scratch import scratch_directory
from amoeba_plugin.shape import SubnetShape

FEWEST, MOST, ENOUGH = 3, 15, 0.2  # times that a question is asked, until it took so many CPU seconds


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how often.

    Attributes:
        prompts: Lengths, tokens.
        decoded: Tokens behind the longest of them.
        rounds: Processes.
        threads: That compute.
        batch: Prompts at a time.
        shapes: How many of the space are measured; ``None``: a quarter, eight at least.
    """

    prompts: tuple[int, ...] = (32, 128, 256)
    decoded: int = 16
    rounds: int = 5
    threads: int = 1
    batch: int = 1
    shapes: int | None = None

    def chosen(self, subject: Subject) -> list[SubnetShape]:
        """Return the shapes to be measured, the largest first."""
        space = list(subject.space)
        count = max(len(space) // 4, 8) if self.shapes is None else self.shapes
        works = [Work.of(subject.sizes(shape)) for shape in space]
        return [space[index] for index in telling(works, count)]


def profile_model(
    subject: Subject,
    flows: Mapping[Point, DeploymentFlow],
    path: Path,
    how: Measuring,
    name: str,
    progress: bool = True,
) -> Profile:
    """Measure shapes of a model in flows, and write the profile after every round.

    Args:
        subject: The model and its space.
        flows: By point.
        path: Of the profile; one that is there is extended.
        how: What is measured.
        name: Of the model, for people.
        progress: Show a progress bar.

    Raises:
        ArtifactError: If the file is a profile of another model, space or machine, or none.
        DeploymentError: If an engine is missing or fails, or prompts do not fit the model.
    """
    longest = max(how.prompts) + how.decoded
    room = getattr(subject.config, "max_position_embeddings", longest)
    if longest > room:
        raise DeploymentError(
            f"prompts of {max(how.prompts)} tokens and {how.decoded} behind them do not fit the model, which has room "
            f"for {room}; take shorter ones"
        )
    for flow in flows.values():
        flow.command()  # refuses where the engine is missing
    with owning(path):
        profile = _begun(subject, path, name)
        shapes = how.chosen(subject)
        total = len(flows) * how.rounds * len(shapes)
        with tqdm(total=total, desc="profile", unit="shape", disable=not progress, leave=False) as bar:
            for point, flow in flows.items():
                bar.set_postfix_str(str(point))
                _Run(subject, profile, path, how, shapes, bar.update).measure(point, flow)
    return profile


def measure_shapes(
    subject: Subject, flows: Mapping[Point, DeploymentFlow], profile: Profile, path: Path, how: Measuring,
    shapes: Sequence[SubnetShape],
) -> None:  # fmt: skip
    """Measure some more shapes into a profile, at the speed that the machine had when that was made: every process runs
    a shape of the profile too, and times are those of a machine on which it takes what it took.

    Arguments and errors are those of :func:`profile_model`.
    """
    with owning(path):
        for point, flow in flows.items():
            anchor = _anchor(subject, profile.flows.get(str(point)), how)
            _Run(subject, profile, path, how, shapes, lambda _: None, anchor).measure(point, flow)


def _anchor(subject: Subject, known: FlowProfile | None, how: Measuring) -> SubnetShape | None:
    """Return the smallest shape of the space that was measured; ``None``: there is none."""
    costs = {} if known is None else known.shapes
    measured = [
        shape for shape in subject.space
        if (cost := costs.get(str(shape)))
        and cost.work == astuple(Work.of(subject.sizes(shape)))
        and any(each.prefill.keys() & set(how.prompts) for each in cost.rounds)
    ]  # fmt: skip
    return min(measured, key=lambda shape: costs[str(shape)].bytes, default=None)


def _begun(subject: Subject, path: Path, name: str) -> Profile:
    sizes = {str(shape): astuple(Work.of(subject.sizes(shape))) for shape in subject.space}
    digest = config_digest(subject.config)
    if not path.exists():
        return Profile(model=name, digest=digest, sizes=sizes, machine=this_machine())
    known = Profile.load(path)
    if known.digest != digest or any(known.sizes.get(shape, work) != work for shape, work in sizes.items()):
        raise ArtifactError(f"{path} is a profile of another model, or of shapes of other sizes; name another file")
    return known.model_copy(update={"sizes": {**known.sizes, **sizes}})


@dataclass(frozen=True)
class _Run:
    """One call of :func:`profile_model`: what is measured of which model, and where it is kept."""

    subject: Subject
    profile: Profile
    path: Path
    how: Measuring
    shapes: Sequence[SubnetShape]
    advance: Callable[[float], object]
    anchor: SubnetShape | None = None

    def measure(self, point: Point, flow: DeploymentFlow) -> None:
        """Measure what is not known of a flow."""
        how, done = self.how, self._done(point, flow.runs_elastic(point.scheme))
        self.advance(sum(min(count, how.rounds) for count in done.values()))
        if min(done.values()) >= how.rounds:
            return
        with scratch_directory() as scratch:
            anchors = [] if self.anchor is None else [self.anchor]
            files = _exported(self.subject, point, flow, list(dict.fromkeys([*self.shapes, *anchors])), scratch)
            for number in range(min(done.values()), how.rounds):
                order = [shape for shape in self.shapes if done[shape] <= number]
                random.Random(number).shuffle(order)  # no shape always comes first, or behind the same one
                with EngineProcess(flow.name, flow.command(), how.threads) as engine:
                    begun = self._begin(engine, flow.runs_elastic(point.scheme))
                    found = self.profile.flows.setdefault(str(point), begun)
                    visits = {}
                    for shape in dict.fromkeys([*anchors, *order]):
                        arguments, _ = files[shape]
                        vocabulary = self.subject.config.vocab_size
                        visits[shape] = visited(engine, {**arguments, **flow.options(point.scheme)}, vocabulary, how)
                        self.advance(1)
                self._keep(found, visits, files)
                self.profile.save(self.path)

    def _keep(
        self, found: FlowProfile, visits: Mapping[SubnetShape, Round],
        files: Mapping[SubnetShape, tuple[dict[str, Any], int]],
    ) -> None:  # fmt: skip
        """Add what a process took, of the anchor only by what the others are told."""
        for shape, visited in visits.items():
            if shape == self.anchor:
                continue
            if self.anchor is not None:
                visited = visited.at_speed(found.shapes[self._name(self.anchor)].least, visits[self.anchor])
            cost = ShapeCost(work=astuple(self._work(shape)), bytes=files[shape][1])
            found.shapes.setdefault(self._name(shape), cost).rounds.append(visited)

    def _work(self, shape: SubnetShape) -> Work:
        return Work.of(self.subject.sizes(shape))

    def _name(self, shape: SubnetShape) -> str:
        """Return what a shape is called: where the profile's own has other sizes, by its own too."""
        work = self._work(shape)
        known = self.profile.works.get(str(shape), work)
        return str(shape) if known == work else f"{shape} of {'/'.join(map(str, astuple(work)))}"

    def _done(self, point: Point, elastic: bool) -> dict[SubnetShape, int]:
        """Return how many rounds are known of every shape, in a flow that runs the elastic model or subnets."""
        how, known = self.how, self.profile.flows.get(str(point))
        if known is None:
            return dict.fromkeys(self.shapes, 0)
        if (known.threads, known.batch, known.decoded) != (how.threads, how.batch, how.decoded):
            raise ArtifactError(
                f"{self.path} has {point} at {known.threads} threads, batches of {known.batch} and {known.decoded} "
                "decoded tokens; measure the same, or name another file"
            )
        if elastic:
            known.require_adapted(self.subject.adapted_by, self.path)
        costs = {shape: known.shapes.get(self._name(shape)) for shape in self.shapes}
        return {shape: 0 if cost is None else cost.rounds_of(how.prompts) for shape, cost in costs.items()}

    def _begin(self, engine: EngineProcess, elastic: bool) -> FlowProfile:
        how, adapted = self.how, self.subject.adapted_by if elastic else ""
        return FlowProfile(
            engine=engine.ask("about").value, threads=how.threads, batch=how.batch, decoded=how.decoded, adapted=adapted
        )


def _exported(
    subject: Subject, point: Point, flow: DeploymentFlow, shapes: Sequence[SubnetShape], scratch: Path
) -> dict[SubnetShape, tuple[dict[str, Any], int]]:
    """Return what the engine loads of every shape, and its bytes."""
    if flow.runs_elastic(point.scheme):
        elastic = subject.save_elastic(scratch)
        size = sum(each.stat().st_size for each in scratch.rglob("*") if each.is_file())
        return {shape: ({"path": str(elastic), "shape": str(shape)}, size) for shape in shapes}
    found = {}
    with flow.exporting() as export:
        for number, shape in enumerate(shapes):
            out = scratch / str(number)
            out.mkdir()
            with scratch_directory() as place:
                subnet, _ = mended(subject.save_shape(shape, place / "subnet"), place / "mended")
                written = export(subnet, point.scheme, out)
            found[shape] = ({"path": str(out / written.entry)}, written.bytes)
    return found


def visited(engine: EngineProcess, arguments: Mapping[str, Any], vocabulary: int, how: Measuring) -> Round:
    """Measure one shape in a process.

    Args:
        engine: Its process.
        arguments: Of ``load``, which say what shape that is.
        vocabulary: Tokens that prompts are drawn from.
        how: Lengths and threads.
    """
    engine.ask("reset_peak")
    context = max(how.prompts) + how.decoded + 1
    loaded = engine.ask("load", threads=how.threads, context=context, batch=how.batch, **arguments)
    draw = random.Random(0)
    prompts = {
        tokens: [[draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(how.batch)]
        for tokens in sorted(how.prompts)
    }
    engine.ask("prefill", prompts=prompts[min(prompts)])  # the first one loads what it needs
    prefill = {tokens: _fastest(engine, "prefill", prompts=batch) for tokens, batch in prompts.items()}
    decoded = _fastest(engine, "decode", count=how.decoded)
    each = Seconds(wall=decoded.wall / how.decoded, cpu=decoded.cpu / how.decoded)
    load = Seconds(wall=loaded.wall, cpu=loaded.cpu)
    return Round(load=load, prefill=prefill, decode=each, peak=engine.ask("peak").value)


def _fastest(engine: EngineProcess, do: str, **arguments: Any) -> Seconds:
    """Return the shortest time of a question, for noise only adds; what is over soon is asked more often."""
    answers = [engine.ask(do, **arguments) for _ in range(FEWEST)]
    while sum(answer.cpu for answer in answers) < ENOUGH and len(answers) < MOST:
        answers.append(engine.ask(do, **arguments))
    return Seconds(wall=min(answer.wall for answer in answers), cpu=min(answer.cpu for answer in answers))
