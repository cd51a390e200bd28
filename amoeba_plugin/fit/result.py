"""What a fit leaves beside its directories: ``fit.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from amoeba_plugin.deployment.search.frontier import Interval
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import write_atomically


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Skipped(_Document):
    """A choice that was better and is not taken, and why."""

    shape: str
    flow: str
    why: str


class Deployment(_Document):
    """What was deployed.

    Attributes:
        shape: Its name.
        flow: Engine and scheme.
        costs: As the budget names them: what it takes, and what is allowed.
        parity: What its engine makes of it, in a sentence.
        mean_kl: The engine's predictions from torch's in fp32, nats per token.
        skipped: Better choices that their engines refused.
    """

    shape: str
    flow: str
    costs: dict[str, str]
    parity: str
    mean_kl: float
    skipped: list[Skipped]


class Fitted(_Document):
    """What a fit found and made.

    Attributes:
        version: Of the document.
        model: Path or hub id of the whole model.
        budget: As it is written.
        deployed: What was chosen.
        whole: Loss of the whole model on text that nothing else saw, nats per token.
        loss: Of the shape that was deployed, before its scheme.
        bytes: Of what was deployed.
        seconds: Wall time of the steps of the run that ended it.
    """

    version: Literal[1] = 1
    model: str
    budget: str
    deployed: Deployment
    whole: Interval
    loss: Interval
    bytes: int
    seconds: dict[str, float]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Fitted:
        """Read it.

        Raises:
            ArtifactError: If it is none, damaged, or of another version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{path} is no result of a fit, damaged, or of another version") from error
