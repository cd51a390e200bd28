"""``elastic.json``: what belongs to an elastic checkpoint, so that what is missing, extra, half or another shows."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from amoeba_plugin.elastic.strategy import JSON_NAME, TENSORS_NAME
from amoeba_plugin.elastic.strategy_document import first_fault
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.whole_weights import weight_files

logger = logging.getLogger(__name__)
FORMAT, VERSION = "amoeba_plugin.ElasticCheckpoint", 2
UNRECORDED_VERSION = 1  # without ``files`` and ``base_files``
ELASTIC_NAME = "elastic.json"
BASE_DIRECTORY, ADAPTER_DIRECTORY = "base", "adapter"
CARD_NAME = "README.md"  # PEFT's, which is for people to edit


class StoredFile(BaseModel):
    """A file as it was written: its bytes, and their digest."""

    model_config = ConfigDict(strict=True, frozen=True)

    size: NonNegativeInt
    sha256: str


class ElasticRecord(BaseModel):
    """What ``elastic.json`` says.

    Attributes:
        version: Of the format.
        base_model: Path or hub id of the base.
        base_model_from_here: Its path as seen from the checkpoint.
        dtype: In which the model was selected on and trained.
        space: Of shapes, for people.
        trained_base: The base is in the checkpoint.
        files: Of strategy and adapter, by path from the checkpoint; None in a checkpoint of an older version.
        base_files: Sizes of the base's files, by path from the base: of all in a trained one, else of its weights; None
            where it is on the hub, and in older checkpoints.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    format: str = FORMAT
    version: int = VERSION
    base_model: str
    base_model_from_here: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    space: str = ""
    trained_base: bool = False
    files: dict[str, StoredFile] | None = None
    base_files: dict[str, NonNegativeInt] | None = None

    def base_of(self, directory: Path) -> str:
        """Return where the base of a checkpoint is: in it, as it was given, or, where that is gone, where it was as
        seen from here."""
        if self.trained_base:
            return str(directory / BASE_DIRECTORY)
        beside = self.base_model_from_here
        if beside is None or Path(self.base_model).exists() or not (directory / beside).exists():
            return self.base_model
        return str((directory / beside).resolve())

    def require_whole(self, directory: Path) -> None:
        """Refuse a checkpoint of which anything is missing, extra, half, or not what was written.

        Raises:
            ArtifactError: With the file.
        """
        if self.version == UNRECORDED_VERSION:
            _tell_unrecorded(directory)
            return
        sizes = {name: each.size for name, each in (self.files or {}).items()}
        _require_sizes(directory, sizes, {name: path.stat().st_size for name, path in _files(directory).items()})
        for name, each in (self.files or {}).items():
            if _digest(directory / name) != each.sha256:
                raise ArtifactError(
                    f"{directory / name} is not the file that was saved with this elastic checkpoint, though as long; "
                    "copy the checkpoint anew, or write it with save_elastic"
                )
        if self.trained_base:
            _require_sizes(directory / BASE_DIRECTORY, self.base_files or {}, _sizes(directory / BASE_DIRECTORY))

    def tell_other_base(self, base: str) -> None:
        """Warn of a base whose files are not those that were trained on; its fingerprint decides whether it is one."""
        if self.trained_base or self.base_files is None or not Path(base).is_dir():
            return
        if _weight_sizes(base) != self.base_files:
            logger.warning(
                "the files of the base %s have other sizes than when the elastic checkpoint was written; it is taken "
                "if its fingerprint is the same",
                base,
            )


def write_record(directory: Path, target: Path, base: str, dtype: str, space: str, trained_base: bool) -> None:
    """Write ``elastic.json`` beside what is in a directory already.

    Args:
        directory: Where the checkpoint is being made.
        target: Where it will be.
        base: Path or hub id of the base.
        dtype: Of the model.
        space: Of shapes.
        trained_base: The base is in the directory.
    """
    record = ElasticRecord(
        base_model=base,
        base_model_from_here=_seen_from(target, base),
        dtype=dtype,  # type: ignore[arg-type]  # pydantic looks
        space=space,
        trained_base=trained_base,
        files={
            name: StoredFile(size=path.stat().st_size, sha256=_digest(path)) for name, path in _files(directory).items()
        },
        base_files=_sizes(directory / BASE_DIRECTORY) if trained_base else _weight_sizes(base),
    )
    write_atomically(directory / ELASTIC_NAME, record.model_dump_json(indent=1, exclude_none=True).encode())


def read_record(directory: Path) -> ElasticRecord:
    """Return what ``elastic.json`` of a checkpoint says, which is whole by it.

    Raises:
        ArtifactError: If there is none, it is damaged, of another format or version, or the files are not those it
            names.
    """
    path = directory / ELASTIC_NAME
    document = _document(path)
    try:
        record = ElasticRecord.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged ({first_fault(error)}); copy the checkpoint anew") from error
    if record.version == VERSION and record.files is None:
        raise ArtifactError(f"{path} is damaged (it names no files); copy the checkpoint anew")
    record.require_whole(directory)
    return record


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{path} does not exist: {path.parent} is no elastic checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is truncated or no JSON ({error}); repeat the training") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a {FORMAT} file; point at a directory that one-for-all training wrote")
    version = document.get("version")
    if type(version) is not int or version not in (UNRECORDED_VERSION, VERSION):
        raise ArtifactError(f"{path} has format version {version}, this amoeba_plugin reads up to {VERSION}")
    return document


@cache
def _tell_unrecorded(directory: Path) -> None:
    logger.warning(
        "%s was written by an older amoeba_plugin and does not say which files belong to it: what is missing would not "
        "be noticed; loading and saving it once (load_elastic, save_elastic) writes that down",
        directory,
    )


def _files(directory: Path) -> dict[str, Path]:
    """Return the files of strategy and adapter, by path from the checkpoint."""
    return {
        name: path
        for name, path in _read(directory).items()
        if name in (JSON_NAME, TENSORS_NAME) or name.startswith(f"{ADAPTER_DIRECTORY}/")
    }


def _sizes(directory: Path) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in _read(directory).items()}


def _read(directory: Path) -> dict[str, Path]:
    """Return the files that some program reads: not those that start with a dot, of hubs and file systems."""
    found = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if name.name != CARD_NAME and not any(part.startswith(".") for part in name.parts)
    }


def _weight_sizes(base: str) -> dict[str, int] | None:
    files = weight_files(Path(base)) if Path(base).is_dir() else None
    return None if files is None else {path.name: path.stat().st_size for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_sizes(directory: Path, recorded: Mapping[str, int], found: Mapping[str, int]) -> None:
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            raise ArtifactError(f"{directory} lacks {name}, which was saved with it; copy the whole elastic checkpoint")
        if name not in recorded:
            raise ArtifactError(
                f"{directory / name} does not belong to this elastic checkpoint and would be read with it; take it away"
            )
        if recorded[name] != found[name]:
            raise ArtifactError(
                f"{directory / name} has {found[name]} bytes, and was saved with {recorded[name]}: it is truncated or "
                "another file; copy the elastic checkpoint anew"
            )


def _seen_from(target: Path, base: str) -> str | None:
    if Path(base).exists():  # a hub id has no place of its own
        with suppress(ValueError):  # on another drive
            return Path(os.path.relpath(Path(base).resolve(), target.resolve())).as_posix()
    return None
