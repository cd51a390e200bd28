"""The files of a model beside its weights: configuration and tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_plugin.errors import ArchitectureError, DataError
from amoeba_plugin.runtime.full_disk import full_disk_named
from amoeba_plugin.runtime.hub import require_answering

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
LONGEST_REASON = 200  # characters; the library lists all that a tokenizer can be made of
ADVICE = "Give a directory that save_pretrained wrote, or a hub id"
# What people point at instead: a file that tells it, what the directory is, what to give.
MISTAKEN = {
    "adapter_config.json": "is a PEFT adapter; give its base model, or a model that the adapter was merged into",
    "elastic.json": "is an elastic checkpoint; give its base model, or what `amoeba extract` cut from it",
}


def load_config(model: str) -> PretrainedConfig:
    """Return a model's configuration, by path or hub id, without its weights.

    Raises:
        ArchitectureError: If there is none, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    path = Path(model)
    if path.is_file():
        raise ArchitectureError(f"the model '{model}' is a file. {ADVICE}")
    for name, instead in MISTAKEN.items():
        if (path / name).is_file() and not (path / "config.json").is_file():
            raise ArchitectureError(f"the model '{model}' {instead}")
    if (path / "adapter_config.json").is_file():
        raise ArchitectureError(
            f"the model '{model}' has a PEFT adapter beside it (adapter_config.json), which transformers would put on "
            "it; merge it into the weights, or move its two files to a directory of their own"
        )
    try:
        require_answering(model)
        config: PretrainedConfig = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"the model '{model}' cannot be loaded: {why_not(model, error)} {ADVICE}") from error
    return config


def why_not(model: str, error: Exception) -> str:
    """Return why transformers could not read a model, in a sentence: a path that is not there is taken for a hub id."""
    if Path(model).is_absolute() and not Path(model).exists():
        return "there is no such directory."
    missing = "" if Path(model).is_dir() else "there is no such directory, and as a hub id: "
    return missing + (str(error).strip().splitlines() or [type(error).__name__])[0]


def copy_tokenizer(reference: str, directory: Path) -> None:
    """Write a model's tokenizer beside a checkpoint; where it has none that can be loaded, log that none is written.

    Raises:
        ArtifactError: If the disk is full.
    """
    try:
        tokenizer = load_tokenizer(reference)
    except DataError as error:  # a base without a tokenizer is legal; its subnet then has none either
        logger.warning("no tokenizer is written beside the checkpoint: %s", error)
        return
    with full_disk_named(directory, "the tokenizer was not written. Free space or name another directory"):
        tokenizer.save_pretrained(directory)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Raises:
        DataError: If transformers can load none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of damaged files the library raises anything
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise DataError(
            f"the model '{model}' has no tokenizer that transformers can load ({type(error).__name__}: {reason}); put "
            "the tokenizer's files beside its weights, whole"
        ) from error
    return tokenizer
