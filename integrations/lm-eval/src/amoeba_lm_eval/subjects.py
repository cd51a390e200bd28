"""What is scored: a model, an elastic checkpoint at its shapes, or what ``amoeba deploy`` wrote."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from amoeba_plugin.deployment.deployed import is_deployed, read_opening, running
from amoeba_plugin.elastic.record import ELASTIC_NAME
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import DataError, ShapeError
from amoeba_plugin.runtime.model_files import load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amoeba_lm_eval.language_models import CountsCut

ALL = "all"
LONGEST = 1024  # tokens, unless more are asked for: memory grows with them, and with the vocabulary
CARD = "README.md"  # for people to edit
AtShape = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Subject(ABC):
    """What is scored.

    Attributes:
        name: As it was named.
        digest: Of its files; of a model on the hub, its revision.
        shapes: What its rows are called, the one that others are compared with first.
        base: Where an elastic checkpoint's base model is now.
    """

    name: str
    digest: str
    shapes: tuple[str, ...]
    base: str | None = None
    kind: ClassVar[str]
    writes: ClassVar[bool] = True  # whether it can be asked for written answers

    @abstractmethod
    def opened(
        self, max_length: int | None, batch_size: int, threads: int
    ) -> AbstractContextManager[tuple[CountsCut, AtShape]]:
        """Have it in memory for a block of code: what lm_eval asks, and what makes a shape the one that answers."""


class Checkpoint(Subject):
    """A model that transformers loads."""

    kind = "model"

    @contextmanager
    def opened(self, max_length: int | None, batch_size: int, threads: int) -> Iterator[tuple[CountsCut, AtShape]]:
        """Load it."""
        from amoeba_plugin.deployment.engines.torch_engine import load_checkpoint
        from amoeba_plugin.runtime.dtypes import computing_dtype, stored_dtype
        from amoeba_plugin.runtime.whole_weights import require_weights

        require_weights(self.name)
        dtype, _ = computing_dtype(stored_dtype(self.name))
        model = load_checkpoint(Path(self.name), dtype)
        yield _transformers(model, self.name, max_length, batch_size), lambda shape: nullcontext()


class Elastic(Subject):
    """An elastic checkpoint: loaded once, whatever shapes are scored."""

    kind = "elastic checkpoint"

    @contextmanager
    def opened(self, max_length: int | None, batch_size: int, threads: int) -> Iterator[tuple[CountsCut, AtShape]]:
        """Load it."""
        from amoeba_plugin.elastic.checkpoint import load_elastic

        live, _ = load_elastic(Path(self.name), self.base)
        yield _transformers(live.model, str(live.config.name_or_path), max_length, batch_size), live.active


class Deployed(Subject):
    """A directory that ``amoeba deploy`` wrote, in its own engine."""

    kind = "deployed subnet"
    writes = False

    @contextmanager
    def opened(self, max_length: int | None, batch_size: int, threads: int) -> Iterator[tuple[CountsCut, AtShape]]:
        """Start its engine."""
        from amoeba_lm_eval.language_models import EngineLM

        _, opening = read_opening(Path(self.name))
        if opening.first is None:
            raise DataError(f"{self.name} has no tokenizer: text cannot be given to it; deploy one that has")
        length = _length(self.name, opening.room, max_length)
        with running(Path(self.name), length + 1, threads) as engine:
            yield EngineLM(engine, opening, length), lambda shape: nullcontext()


def subject_of(name: str, shapes: str = ALL, base: str | None = None) -> Subject:
    """Find out what a path or hub id is; no weights are loaded.

    Args:
        name: A model's, an elastic checkpoint's, or that of a directory which was deployed.
        shapes: "all", or shapes of an elastic checkpoint, separated by commas.
        base: Where its base model is now.

    Raises:
        ArchitectureError: If it is no model.
        ArtifactError: If an elastic checkpoint or a deployed directory is damaged.
        ShapeError: If shapes are asked for that it has not.
    """
    path = Path(name)
    if (path / ELASTIC_NAME).is_file():
        space = SubnetStrategy.load(path).space
        asked = list(space) if shapes == ALL else [space.require(each) for each in shapes.split(",")]
        ordered = tuple(str(shape) for shape in space if shape in asked)
        return Elastic(name, _digest(path), ordered, base)
    if shapes != ALL:
        raise ShapeError(f"{name} is no elastic checkpoint, so that it has one shape only; leave --shapes out")
    if is_deployed(path):
        named, opening = read_opening(path)
        return Deployed(name, _digest(path), (f"{opening.shape} in {named}",))
    config = load_config(name)
    digest = _digest(path) if path.is_dir() else str(getattr(config, "_commit_hash", None) or name)
    return Checkpoint(name, digest, (path.name,))


def _transformers(model: PreTrainedModel, tokenizer: str, max_length: int | None, batch_size: int) -> CountsCut:
    from amoeba_lm_eval.language_models import TransformersLM
    from amoeba_lm_eval.tasks import quiet

    length = _length(tokenizer, getattr(model.config, "max_position_embeddings", None), max_length)
    with quiet():
        return TransformersLM(
            pretrained=model, backend="causal", tokenizer=load_tokenizer(tokenizer), batch_size=batch_size,
            max_length=length,
        )  # fmt: skip


def _length(name: str, room: int | None, asked: int | None) -> int:
    """Return how many tokens are seen."""
    if asked is not None and room is not None and asked > room:
        raise DataError(f"--max-length {asked} is more than {name} was made for, {room} tokens; ask for less")
    return asked or min(room or LONGEST, LONGEST)


def _digest(directory: Path) -> str:
    """Return what identifies the files of a directory, to the byte."""
    digest = hashlib.sha256()
    for path in sorted(each for each in directory.rglob("*") if each.is_file()):
        name = path.relative_to(directory)
        if name.name != CARD and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                digest.update(f"{name.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
