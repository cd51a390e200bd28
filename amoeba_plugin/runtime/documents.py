"""JSON files with a schema: written whole or not at all, and read back or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import write_atomically


class Part(BaseModel):
    """A part of a document; fields that it has not are refused, and an interval may have no end."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Document(Part):
    """A file.

    Attributes:
        what: It is, for people: "a result of a search".
    """

    what: ClassVar[str]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it.

        Raises:
            ArtifactError: If it is none, damaged, or of another version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{path} is not {cls.what}, damaged, or of another version") from error
