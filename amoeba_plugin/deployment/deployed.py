"""A directory that ``amoeba deploy`` wrote, opened again: its engine runs, by what ``parity.json`` says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.extraction.parity import PARITY_NAME
from amoeba_plugin.runtime.model_files import copy_tokenizer, load_config, load_tokenizer

KEY = "opening"  # in parity.json, that of a deployed directory
PATIENCE = 1800.0  # seconds for one answer: probabilities of many positions are one


class Served(BaseModel):
    """What a service needs of a deployed subnet.

    Attributes:
        vocabulary: Tokens that its logits are of.
        ends: Tokens that end an answer.
        digest: Of the whole model's configuration: profiles say by it which model they are of.
        work: Sublayers, heads and neurons of the shape, of which profiles tell the costs.
    """

    model_config = ConfigDict(extra="forbid")

    vocabulary: int
    ends: tuple[int, ...]
    digest: str
    work: tuple[int, int, int]

    @classmethod
    def of(cls, checkpoint: Path, digest: str, work: tuple[int, int, int]) -> Served:
        """Return that of a checkpoint which was exported."""
        config = load_config(str(checkpoint))
        told = [config.eos_token_id]
        with suppress(OSError):  # there is none
            told.append(GenerationConfig.from_pretrained(checkpoint).eos_token_id)
        if _has_tokenizer(checkpoint):
            told.append(load_tokenizer(str(checkpoint)).eos_token_id)
        ends = {int(end) for each in told for end in (each if isinstance(each, list) else [each]) if end is not None}
        return cls(vocabulary=config.vocab_size, ends=tuple(sorted(ends)), digest=digest, work=work)


class Opening(BaseModel):
    """What is needed to run a deployed subnet, beside its engine.

    Attributes:
        entry: What the engine loads, relative to the directory.
        shape: Of the subnet.
        room: Tokens that the model was made for; ``None``: its configuration does not say.
        first: Token that stands in front of a text with nothing before it; ``None``: there is no tokenizer.
        added: Tokens that its tokenizer puts in front of every text.
        served: What a service needs; ``None``: it was written by a version that did not say.
    """

    model_config = ConfigDict(extra="forbid")

    entry: str
    shape: str
    room: int | None = None
    first: int | None = None
    added: tuple[int, ...] = ()
    served: Served | None = None

    @classmethod
    def of(cls, checkpoint: Path, entry: str, shape: str, served: Served | None = None) -> Opening:
        """Return that of a checkpoint which was exported."""
        room = getattr(load_config(str(checkpoint)), "max_position_embeddings", None)
        if not _has_tokenizer(checkpoint):
            return cls(entry=entry, shape=shape, room=room, served=served)
        tokenizer = load_tokenizer(str(checkpoint))
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return cls(entry=entry, shape=shape, room=room, first=first, added=_added(tokenizer), served=served)


def is_deployed(directory: Path) -> bool:
    """Tell whether a directory is of ``amoeba deploy``; subnet checkpoints have a ``parity.json``, too."""
    return "point" in _record(directory)


def read_opening(directory: Path) -> tuple[str, Opening]:
    """Return ``flow:scheme`` of a deployed directory, and what is needed to run it.

    Raises:
        ArtifactError: If it is none, or was written by a version that did not say that.
    """
    record = _record(directory)
    if "point" not in record:
        raise ArtifactError(f"{directory} is nothing that `amoeba deploy` wrote: its {PARITY_NAME} names no engine")
    try:
        return str(record["point"]), Opening.model_validate(record[KEY])
    except (KeyError, ValidationError) as error:
        raise ArtifactError(
            f"{directory / PARITY_NAME} does not say how the subnet is opened: it is of an older version, or damaged; "
            "deploy the shape again"
        ) from error


@contextmanager
def running(directory: Path, context: int, threads: int = 1, requests: int | None = None) -> Iterator[EngineProcess]:
    """Run a deployed subnet in its engine, as users do, for a block of code.

    Args:
        directory: What ``amoeba deploy`` wrote.
        context: Tokens that one prompt and what follows it may have.
        threads: That compute.
        requests: How many ``follow`` is asked for at a time; ``None``: it is not.

    Raises:
        ArtifactError: If it is no such directory, or lacks a file.
        DeploymentError: If the engine is missing or fails.
        PluginError: If nobody registered its flow.
    """
    named, opening = read_opening(directory)
    flow, point = point_named(named)
    path = directory / opening.entry
    if not path.exists():
        raise ArtifactError(f"{directory} lacks {opening.entry}, which {named} runs; copy the whole directory")
    options = flow.options(point.scheme) | ({} if requests is None else {"requests": requests})
    with EngineProcess(flow.name, flow.command(), threads, PATIENCE) as engine:
        engine.ask("load", path=str(path), threads=threads, context=context, batch=1, **options)
        yield engine


def write_tokenizer(checkpoint: Path, directory: Path) -> None:
    """Write a checkpoint's tokenizer beside what an engine loads, where that is not read by transformers itself."""
    if _has_tokenizer(checkpoint) and not _has_tokenizer(directory):
        copy_tokenizer(str(checkpoint), directory)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(with_special[: with_special.index(plain[0])]) if plain else ()


def _record(directory: Path) -> dict[str, object]:
    try:
        record = json.loads((directory / PARITY_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
