"""A training that is killed goes on from its last whole checkpoint, to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import DistBackendError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from amoeba_plugin.errors import ArtifactError, TrainingError
from amoeba_plugin.training.checkpoints import (
    could_not_write,
    is_complete,
    last_complete_checkpoint,
    require_same_training,
)
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from support.batches import make_rows
from support.training import PAPER, add_smol, make_arguments, make_elastic, make_trainer, parameters_of

TESTS = Path(__file__).parent.parent
TRIALS = 8


def test_a_killed_training_ends_bit_equal_to_one_that_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "support.resume_trials", str(tmp_path), str(TRIALS)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=TESTS, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["trials"]) == TRIALS
    assert {trial["digest"] for trial in found["trials"]} == {found["expected"]}
    assert len({trial["step"] for trial in found["trials"]}) > 2  # killed early and late


class ClockSetBack(TrainerCallback):
    """Gives what was saved a time to come, each an earlier one than the one before it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        later = time.time() + 10_000 - 100 * state.global_step
        os.utime(Path(args.output_dir) / f"checkpoint-{state.global_step}", (later, later))


def test_the_checkpoints_of_the_most_steps_stay_whatever_the_clock_says(tmp_path: Path) -> None:
    trainer = make_trainer(
        make_elastic(), tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2
    )
    trainer.add_callback(ClockSetBack())
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    assert trainer.args.save_total_limit == 2


class Interruption(TrainerCallback):
    """Stops a run after some steps, without shortening its plan."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("adapter", ["none", "smol"])
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path: Path, adapter: str):
    fields = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2,
              "per_device_train_batch_size": 2, "max_grad_norm": 1.0, "lr_scheduler_type": "linear"}  # fmt: skip

    def run(directory: str, callbacks: list[TrainerCallback] | None = None, **more: Any):
        elastic = make_elastic(attention_dropout=0.1)
        model = add_smol(elastic, lora_dropout=0.1) if adapter == "smol" else elastic.model
        arguments = make_arguments(tmp_path / directory, **fields, **more)
        train_one_for_all(elastic, model, make_rows(), PAPER, arguments, callbacks=callbacks)
        return parameters_of(model)

    whole, again = run("whole"), run("again")
    run("resumed", [Interruption(2)])
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    state = json.loads((tmp_path / "whole" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-5").iterdir()}
    assert ("adapter_model.safetensors" in files) == (adapter == "smol")


def test_going_on_from_the_last_checkpoint_passes_over_one_that_was_interrupted(tmp_path: Path):
    def run(steps: int, resume: str | bool | None = None) -> dict[str, Tensor]:
        elastic = make_elastic()
        trainer = make_trainer(elastic, tmp_path, save_strategy="steps", save_steps=1, max_steps=steps)
        assert trainer.train(resume_from_checkpoint=resume).global_step == steps
        return parameters_of(elastic.model)

    with pytest.raises(TrainingError, match="no checkpoint in .* was written to its end; start again"):
        run(3, True)
    expected = run(3)
    for name in ("optimizer.pt", "trainer_state.json"):
        (tmp_path / "checkpoint-3" / name).unlink()
    with pytest.raises(TrainingError, match="checkpoint-3 was not written to its end; go on from .*checkpoint-2"):
        run(3, str(tmp_path / "checkpoint-3"))
    found = run(3, True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("batch_size", [2, 3])  # rows of an epoch: a whole number of steps, and not
def test_a_training_that_took_its_last_step_takes_no_other(tmp_path: Path, batch_size: int):
    def run(resume: bool) -> dict[str, Tensor]:
        elastic = make_elastic()
        trainer = make_trainer(elastic, tmp_path, max_steps=3, save_strategy="steps", save_steps=1,
                               per_device_train_batch_size=batch_size)  # fmt: skip
        assert trainer.train(resume_from_checkpoint=resume).global_step == 3
        return parameters_of(elastic.model)

    expected, found = run(False), run(True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def checkpoint(directory: Path, step: int, state: str | None) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    whole = checkpoint(tmp_path, 9, '{"global_step": 9}')
    checkpoint(tmp_path, 10, None)
    checkpoint(tmp_path, 11, '{"global_st')
    checkpoint(tmp_path, 12, '{"global_step": 3}')
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == whole
    assert not is_complete(tmp_path / "checkpoint-12")
    assert is_complete(whole.rename(tmp_path / "the one I liked"))


def test_files_that_cannot_be_written_are_told_from_other_errors(tmp_path: Path) -> None:
    def error_of(action: Callable[[], object]) -> BaseException:
        with pytest.raises(BaseException) as caught:  # noqa: PT011  # torch's of a sharded checkpoint is no Exception
            action()
        return caught.value

    def write(directory: Path) -> None:
        (directory / "file").write_text("x")

    tensors = {"a": torch.zeros(9)}
    missing = tmp_path / "missing"
    for action in (
        lambda: torch.save(tensors, "/dev/full"),
        lambda: save_file(tensors, missing / "file"),
        lambda: write(missing),
    ):
        error = error_of(action)
        assert could_not_write(error)
        assert could_not_write(CheckpointException("", {1: (error, StackSummary())}))
    others = (DistBackendError("gone"), RuntimeError("shapes"), OSError("hub"), ConnectionResetError(104, "reset"))
    assert not any(map(could_not_write, (*others, CheckpointException("", {0: (others[0], StackSummary())}))))


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    settings = {"model": "abc", "space": "4x1", "learning_rate": 0.1, "adapter": {"r": 4}}
    require_same_training(tmp_path / "run", settings)
    require_same_training(tmp_path / "run", settings)
    with pytest.raises(ArtifactError, match="its space is 4x1, here it is 3x1"):
        require_same_training(tmp_path / "run", settings | {"space": "3x1"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds no checkpoints of this training"):
        require_same_training(tmp_path / "other", settings)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
