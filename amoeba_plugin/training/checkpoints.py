"""Checkpoints of a training in progress: which one is whole, and whether it belongs to the training at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.files import clear_partials, write_atomically
from amoeba_plugin.runtime.full_disk import full_disk_named

SETTINGS_NAME = "one_for_all.json"
TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")  # in its messages about files


def last_complete_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; None where there is none.

    Trainer writes its state last: a checkpoint whose state is missing or cut off was interrupted while being saved.

    Args:
        directory: ``output_dir`` of a training.
    """
    steps = sorted(
        (int(path.name.rpartition("-")[2]), path)
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit()
    )
    return next((path for _, path in reversed(steps) if is_complete(path)), None)


def require_same_training(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuse checkpoints of another training; note the settings where there are none yet.

    Args:
        directory: Holds the checkpoints, or will.
        settings: What must be equal for a training to go on: JSON values by name.

    Raises:
        ArtifactError: If the directory belongs to another model, space or recipe, or holds something else, or its disk
            is full.
    """
    path = directory / SETTINGS_NAME
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged ({error}); name another checkpoint_dir") from error
        wanted = json.loads(json.dumps(settings))
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ArtifactError(
                    f"{directory} holds checkpoints of another training: its {name} is {found.get(name)}, here it is "
                    f"{wanted.get(name)}; name another checkpoint_dir, or repeat the recipe it was begun with"
                )
        return
    clear_partials(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ArtifactError(f"{directory} exists and holds no checkpoints of this training; name another directory")
    with full_disk_named(directory, "free space or name another checkpoint_dir"):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=1).encode())


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end; one that Trainer named, whether it is of that step."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    prefix, _, step = checkpoint.name.rpartition("-")
    named = step if prefix == PREFIX_CHECKPOINT_DIR else None
    return isinstance(state, dict) and "global_step" in state and named in (None, str(state["global_step"]))


def is_over(state: TrainerState) -> bool:
    """Tell whether a training has taken its last step; Trainer, resumed there, would take one more."""
    return 0 < state.max_steps <= state.global_step


def could_not_write(error: BaseException) -> bool:
    """Tell whether an error is a file that could not be written, and not, say, a process that another waits for."""
    if isinstance(error, CheckpointException):  # of sharded files: what went wrong on which rank
        return any(could_not_write(failure) for failure, *_ in error.failures.values())
    if isinstance(error, OSError):  # a hub that does not answer is one without a number
        return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
    # torch reports a file that it could not write as a RuntimeError, safetensors as an error of its own
    return isinstance(error, SafetensorError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in TORCH_WRITER)
    )
