"""What the demo runs on: its model, how much of everything, and text by purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import materialise, require_disjoint
from amoeba_plugin.demo.corpus import part_files, token_blocks
from amoeba_plugin.demo.multiple_choice import multiple_choice

MODEL = Path(__file__).parent / "model"
BLOCK_SIZE = 256
BATCH_SIZE = 8
JUDGED_BLOCKS = 24


@dataclass(frozen=True)
class Schedule:
    """How much of everything; sizes of data in blocks of ``BLOCK_SIZE`` tokens."""

    shapes: tuple[str, ...]
    calibration_blocks: int
    training_blocks: int
    held_out_blocks: int
    questions: int
    training_steps: int | None  # None: the recipe's
    compared_depths: tuple[int, ...]
    random_selections: int
    latency_rounds: int
    profile_rounds: int
    profile_shapes: int
    measures: bool  # shapes whose predicted costs straddle a budget


FULL = Schedule(
    ("12x1", "12x3/4", "12x1/2", "10x1", "10x3/4", "10x1/2", "8x1", "8x3/4", "8x1/2"),
    20, 1600, 40, 40, None, (10, 8), 3, 4, 5, 8, True,
)  # fmt: skip
QUICK = Schedule(("12x1", "10x3/4", "8x1/2"), 8, 64, 8, 16, 4, (10,), 1, 2, 1, 5, False)


@dataclass(frozen=True)
class DemoData:
    """Text by purpose; selection and training see the train part alone, every figure comes from held-out modules; a
    search within a budget judges by other blocks of these."""

    calibration: list[Batch]
    training: Dataset
    held_out: list[Batch]
    questions: list[Batch]
    judged: Dataset


def demo_data(tokenizer: PreTrainedTokenizerBase, schedule: Schedule, seed: int) -> DemoData:
    """Draw calibration and training blocks from the train part, evaluation blocks and questions from held-out
    modules."""
    train = token_blocks(part_files("train"), tokenizer, BLOCK_SIZE).shuffle(seed=seed)
    held_out_files = part_files("held_out")
    held_out = token_blocks(held_out_files, tokenizer, BLOCK_SIZE).shuffle(seed=seed)
    selected = schedule.calibration_blocks + schedule.training_blocks
    calibration = batches_of(train.select(range(schedule.calibration_blocks)))
    reported = batches_of(held_out.select(range(schedule.held_out_blocks)))
    require_disjoint(calibration, reported)
    return DemoData(
        calibration=calibration,
        training=train.select(range(schedule.calibration_blocks, min(selected, len(train)))),
        held_out=reported,
        questions=multiple_choice(held_out_files, tokenizer, schedule.questions, seed),
        judged=held_out.select(range(schedule.held_out_blocks, schedule.held_out_blocks + JUDGED_BLOCKS)),
    )


def batches_of(blocks: Dataset) -> list[Batch]:
    """Return blocks as batches of ``BATCH_SIZE`` rows, in order."""
    return materialise(DataLoader(blocks.with_format("torch"), batch_size=BATCH_SIZE))
