"""What is ablated on: a trained model, its texts, and the space of shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.data.multiple_choice import QuestionColumns, load_questions
from amoeba_plugin.demo.corpus import part_files, token_blocks
from amoeba_plugin.demo.data import MODEL as DEMO_MODEL
from amoeba_plugin.runtime.dtypes import has_instructions

BLOCK = 256
PARTS = ("valid", "test")  # of WikiText-2
Allocation = Literal["uniform", "measured", "global"]
ASSETS = Path(os.environ.get("AMOEBA_TEST_ASSETS", "."))


@dataclass(frozen=True)
class Subject:
    """A model and everything that an ablation needs of it; texts are blocks of ``BLOCK`` tokens.

    Args:
        path: Of the dense model.
        calibrations: Texts to select on, by name; the first is the training's own.
        training: Text to train on.
        validation: Text that learning rates, and Table 1's shapes, are chosen on.
        held_out: Text that nothing was chosen or trained on.
        depths: Three depths, the whole model first.
        budgets: Depths whose shares of the layers are the shares of the block parameters that Table 1 allows;
            Taylor+ must be able to keep them: the first 4 layers and the last 2 stay.
        widths: Widths; the first three are Table 4's.
        allocation: How many units a width keeps, where a table does not say otherwise.
        round_to: Channels that kept sizes are multiples of.
        steps: Steps of one-for-all training.
        rank: Of an adapter.
        learning_rates: Of AdamW; every way to train gets its own best one.
        other_texts: More text that nothing was chosen or trained on, by name.
        pool: Rows that calibration data of a seed is drawn from, by kind; as many of each.
        draws: Rows that are drawn of each.
        questions: Sets of questions that nothing was chosen on, by name.
        dtype: That the model computes in.
    """

    path: Path
    calibrations: Mapping[str, list[Batch]]
    training: Dataset
    validation: list[Batch]
    held_out: list[Batch]
    depths: tuple[int, int, int]
    budgets: tuple[int, ...]
    widths: tuple[Fraction, ...]
    allocation: Allocation
    round_to: int
    steps: int
    rank: int
    learning_rates: tuple[float, ...]
    other_texts: Mapping[str, list[Batch]] = field(default_factory=dict)
    pool: Sequence[Dataset] = ()
    draws: int = 0
    questions: Mapping[str, list[Batch]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def drawn(self, seed: int) -> list[Batch]:
        """Return calibration data that a seed draws."""
        rows = [part.shuffle(seed=seed).select(range(self.draws)) for part in self.pool]
        return batches(concatenate_datasets(rows).shuffle(seed=seed))

    @property
    def reports(self) -> Mapping[str, list[Batch]]:
        """Texts that nothing was chosen or trained on, by name."""
        return {self.own_text: self.held_out, **self.other_texts}

    @property
    def own_text(self) -> str:
        """Name of the calibration text that is the training's own."""
        return next(iter(self.calibrations))

    def model(self) -> PreTrainedModel:
        """Load the dense model anew."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype).eval()


def demo() -> Subject:
    """Return the model that comes with the package, on Python's standard library."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    train = token_blocks(part_files("train"), tokenizer, BLOCK).shuffle(seed=42)
    held_out = token_blocks(part_files("held_out"), tokenizer, BLOCK).shuffle(seed=42)
    return Subject(
        path=DEMO_MODEL,
        calibrations={"Python": batches(train.select(range(20))), **_other_texts(tokenizer, 20)},
        training=train.select(range(20, 1620)),
        validation=batches(held_out.select(range(48, 72))),
        held_out=batches(held_out.select(range(48))),
        depths=(12, 10, 8),
        budgets=(10, 8, 6),
        widths=tuple(Fraction(n, 8) for n in (8, 6, 4, 7, 5)),
        allocation="measured",
        round_to=32,
        steps=80,
        rank=16,
        pool=[train.select(range(20, 420))],
        draws=64,
        learning_rates=(6e-3, 1.2e-2, 2.4e-2),
    )


def stories() -> Subject:
    """Return stories260K on stories that it told itself: its training text is not at hand."""
    path = ASSETS / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(path)
    told = _told_stories(path, 1024 + 96 + 20)
    return Subject(
        path=path,
        calibrations={"stories": batches(told.select(range(20))), **_other_texts(tokenizer, 20)},
        training=told.select(range(116, len(told))),
        validation=batches(told.select(range(84, 116))),
        held_out=batches(told.select(range(20, 84))),
        depths=(5, 4, 3),
        budgets=(),
        widths=tuple(Fraction(n, 4) for n in (4, 3, 2)),
        allocation="uniform",
        round_to=1,
        steps=100,
        rank=8,
        learning_rates=(1e-2, 2e-2, 4e-2),
    )


def smollm2() -> Subject:
    """Return SmolLM2-135M from the directory AMOEBA_TEST_MODEL, on halves of WikiText-2 and of dolly's instructions."""
    path = Path(os.environ["AMOEBA_TEST_MODEL"])
    tokenizer, text = AutoTokenizer.from_pretrained(path), ASSETS / "text"
    pairs = [json.loads(line) for line in (text / "dolly_hhrlhf_small.jsonl").read_text("utf-8").splitlines()]
    dolly = tokenizer("\n\n".join(pair["prompt"] + pair["response"] for pair in pairs))["input_ids"]
    valid, test = (tokenizer((text / f"wikitext2.{part}.txt").read_text("utf-8"))["input_ids"] for part in PARTS)
    apart = 528 * BLOCK  # behind what is trained on
    pool = [_rows(_cut(valid, 240)), _rows(_cut(dolly, 128) + _cut(dolly[apart:], 112))]
    mixed = concatenate_datasets([each.select(range(32)) for each in pool]).shuffle(seed=42)
    asked = QuestionColumns("query", "choices", "gold")
    long = 2 * BLOCK
    return Subject(
        path=path,
        calibrations={"WikiText-2": batches(mixed)},
        training=_rows(_cut(dolly[128 * BLOCK :], 400)),
        validation=batches(_rows(_cut(valid[-24 * BLOCK :], 24))),
        held_out=batches(_rows(_cut(test, 64, long)), 4),
        depths=(30, 24, 20),
        budgets=(),
        widths=(Fraction(1), Fraction(13, 20), Fraction(1, 2)),
        allocation="measured",
        round_to=1,
        steps=40,
        rank=16,
        learning_rates=(2e-3, 5e-3, 1e-2),
        other_texts={"dolly": batches(_rows(_cut(dolly[-32 * long :], 32, long)), 4)},
        pool=pool,
        draws=128,
        dtype=torch.bfloat16 if has_instructions(torch.bfloat16) else torch.float32,
        questions={
            name: load_questions(
                str(ASSETS / "eval" / f"{name}.jsonl"),
                tokenizer,
                split="train",
                num_questions=500,
                vocab_size=tokenizer.vocab_size,
                seed=0,
                columns=asked,
                letters=False,
            )
            for name in ("arc_easy", "piqa")
        },
    )


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"demo": demo, "stories260K": stories, "SmolLM2": smollm2}


def batches(blocks: Dataset, size: int = 8) -> list[Batch]:
    """Return blocks as batches."""
    return materialise(DataLoader(blocks.with_format("torch"), batch_size=size))


def _other_texts(tokenizer: PreTrainedTokenizerBase, blocks: int) -> dict[str, list[Batch]]:
    files = {"Shakespeare": "tinyshakespeare.txt", "WikiText-2": "wikitext2.valid.txt"}
    paths = {name: ASSETS / "text" / file for name, file in files.items()}
    return {
        name: batches(_rows(_cut(tokenizer(path.read_text("utf-8")[: blocks * BLOCK * 8])["input_ids"], blocks)))
        for name, path in paths.items()
        if path.is_file()
    }


def _cut(tokens: Sequence[int], blocks: int, length: int = BLOCK) -> list[list[int]]:
    return [list(tokens[start : start + length]) for start in range(0, blocks * length, length)]


def _rows(blocks: Sequence[Sequence[int]]) -> Dataset:
    ids = [list(block) for block in blocks]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids], "labels": ids})


@torch.no_grad()
def _told_stories(path: Path, count: int) -> Dataset:
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    start = torch.full((count, 1), model.config.bos_token_id)
    told = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, min_new_tokens=BLOCK - 1,
        max_new_tokens=BLOCK - 1, top_k=0, pad_token_id=model.config.eos_token_id,
    )  # fmt: skip
    return _rows(told.tolist())
