"""Several directories that ``amoeba deploy`` wrote, of one model and one engine, each of another shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amoeba_plugin.deployment.deployed import Opening, Served, read_opening
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.shape import SubnetShape


@dataclass(frozen=True)
class DeployedShapes:
    """What one engine serves side by side.

    Attributes:
        point: ``flow:scheme``.
        directories: By shape.
        openings: By shape.
    """

    point: str
    directories: Mapping[SubnetShape, Path]
    openings: Mapping[SubnetShape, Opening]

    @classmethod
    def of(cls, directories: Sequence[Path]) -> DeployedShapes:
        """Read directories.

        Raises:
            ArtifactError: If one was not deployed, or they are of several engines, or two of one shape.
        """
        opened = [(directory, *read_opening(directory)) for directory in directories]
        points = sorted({point for _, point, _ in opened})
        if len(points) != 1:
            raise ArtifactError(f"one engine serves all shapes, and these are of {', '.join(points) or 'none'}")
        found = {SubnetShape.parse(opening.shape): directory for directory, _, opening in opened}
        if len(found) < len(opened):
            raise ArtifactError("two of the directories hold the same shape; name each shape once")
        return cls(points[0], found, {SubnetShape.parse(opening.shape): opening for _, _, opening in opened})

    @property
    def room(self) -> int | None:
        """Tokens that a prompt and its answer may have together, by the models' configurations."""
        rooms = [each.room for each in self.openings.values() if each.room is not None]
        return min(rooms, default=None)

    def served(self) -> Mapping[SubnetShape, Served]:
        """Return what a service needs of each.

        Raises:
            ArtifactError: If one does not say it, or they are of several models.
        """
        found: dict[SubnetShape, Served] = {}
        for shape, opening in self.openings.items():
            if opening.served is None:
                raise ArtifactError(
                    f"{self.directories[shape]} was deployed by a version that did not write what a service needs; "
                    "deploy the shape again"
                )
            found[shape] = opening.served
        if len({(each.digest, each.vocabulary) for each in found.values()}) > 1:
            named = ", ".join(map(str, self.directories.values()))
            raise ArtifactError(f"a service has one model, and {named} are of several; name shapes of one of them")
        return found
