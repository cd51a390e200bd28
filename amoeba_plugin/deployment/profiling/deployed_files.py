"""Measuring what was deployed: the files themselves, each as its engine runs it, none made for the purpose."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from amoeba_plugin.deployment.deployed import Served
from amoeba_plugin.deployment.deployed_shapes import DeployedShapes
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.profiling.measure import Measuring, visited
from amoeba_plugin.deployment.profiling.profile import FlowProfile, Profile, ShapeCost, this_machine
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.shape import SubnetShape


def profile_files(files: DeployedShapes, path: Path, how: Measuring, progress: bool = True) -> Profile:
    """Measure every shape that was deployed, and write the profile after every round.

    Args:
        files: Of one engine.
        path: Of the profile; one that is there is extended.
        how: Lengths, rounds, threads.
        progress: Show a progress bar.

    Raises:
        ArtifactError: If the file is a profile of another model, shapes or machine, or was measured in another way.
        DeploymentError: If the engine is missing or fails.
    """
    with owning(path):
        served = files.served()
        profile = known_of(files, path) or _begun(files, served)
        profile.sizes.update({str(shape): each.work for shape, each in served.items()})
        total = how.rounds * len(files.directories)
        with tqdm(total=total, desc="profile", unit="shape", disable=not progress, leave=False) as bar:
            for number in range(how.rounds):
                _Round(files, served, profile, how, bar).measure(number)
                profile.save(path)
    return profile


def known_of(files: DeployedShapes, path: Path) -> Profile | None:
    """Return the profile that a file holds; ``None``: there is none yet.

    Raises:
        ArtifactError: If it is of another model or machine, or of shapes of other sizes.
    """
    if not path.exists():
        return None
    profile = Profile.load(path)
    for shape, each in files.served().items():
        if profile.digest != each.digest or profile.sizes.get(str(shape), each.work) != each.work:
            raise ArtifactError(
                f"{path} is a profile of another model than {files.directories[shape]}, or of shapes of other sizes; "
                "name another file"
            )
    return profile


@dataclass(frozen=True)
class _Round:
    """One process that visits shapes, in a random order."""

    files: DeployedShapes
    served: Mapping[SubnetShape, Served]
    profile: Profile
    how: Measuring
    bar: Any

    def measure(self, number: int) -> None:
        """Visit what was not visited so often."""
        flow, point = point_named(self.files.point)
        order = [shape for shape in self.files.directories if self._rounds(shape) <= number]
        self.bar.update(len(self.files.directories) - len(order))
        if not order:
            return
        random.Random(number).shuffle(order)  # no shape always comes first, or behind the same one
        with EngineProcess(flow.name, flow.command(), self.how.threads) as engine:
            found = self._flow(engine)
            for shape in order:
                entry = self.files.directories[shape] / self.files.openings[shape].entry
                arguments = {"path": str(entry), **flow.options(point.scheme)}
                cost = ShapeCost(work=self.served[shape].work, bytes=_bytes(entry))
                took = visited(engine, arguments, self.served[shape].vocabulary, self.how)
                found.shapes.setdefault(str(shape), cost).rounds.append(took)
                self.bar.update()

    def _rounds(self, shape: SubnetShape) -> int:
        flow = self.profile.flows.get(self.files.point)
        cost = None if flow is None else flow.shapes.get(str(shape))
        return 0 if cost is None else cost.rounds_of(self.how.prompts)

    def _flow(self, engine: EngineProcess) -> FlowProfile:
        how, point = self.how, self.files.point
        known = self.profile.flows.get(point)
        if known is None:
            begun = FlowProfile(
                engine=engine.ask("about").value, threads=how.threads, batch=how.batch, decoded=how.decoded
            )
            return self.profile.flows.setdefault(point, begun)
        if (known.threads, known.batch, known.decoded) != (how.threads, how.batch, how.decoded):
            raise ArtifactError(
                f"the profile has {point} at {known.threads} threads, batches of {known.batch} and {known.decoded} "
                "decoded tokens; measure the same, or name another file"
            )
        return known


def _begun(files: DeployedShapes, served: Mapping[SubnetShape, Served]) -> Profile:
    digest = next(iter(served.values())).digest
    return Profile(model=files.point, digest=digest, sizes={}, machine=this_machine())


def _bytes(entry: Path) -> int:
    return sum(each.stat().st_size for each in (entry.rglob("*") if entry.is_dir() else [entry]) if each.is_file())
