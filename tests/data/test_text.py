"""Data sets are read from wherever they lie, into blocks of tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from amoeba_plugin.data.text import load_batches, read_rows
from amoeba_plugin.errors import DataError
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word w0..w199; BOS 1, EOS 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number + 3 for number in range(200)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TEXTS = [" ".join(f"w{10 * row + word}" for word in range(10)) for row in range(20)]
# the whole text as tokens, each row followed by EOS
STREAM = [token for row in range(20) for token in (*range(10 * row + 3, 10 * row + 13), 2)]
OPTIONS = {"split": "train", "num_samples": 5, "max_seq_length": 8, "batch_size": 2, "vocab_size": 210, "seed": 0}


def write(path: Path, kind: str) -> str:
    if kind == "txt":
        path.with_suffix(".txt").write_text("\n".join(TEXTS))
    elif kind == "jsonl":
        path.with_suffix(".jsonl").write_text(
            "\n".join(json.dumps({"id": str(i), "text": t}) for i, t in enumerate(TEXTS))
        )
    elif kind == "json":
        path.with_suffix(".json").write_text(json.dumps([{"content": text, "id": i} for i, text in enumerate(TEXTS)]))
    elif kind == "csv":
        Dataset.from_dict({"content": TEXTS}).to_csv(str(path.with_suffix(".csv")), index=False)
    elif kind == "parquet":
        Dataset.from_dict({"content": TEXTS}).to_parquet(str(path.with_suffix(".parquet")))
    elif kind == "directory":
        Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))
        return str(path)
    elif kind == "splits":
        DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(path))
        return str(path)
    return str(path.with_suffix(f".{kind}"))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "directory", "splits"])
def test_text_from_anywhere_becomes_blocks(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    batches = load_batches(write(tmp_path / "data", kind), tokenizer, **OPTIONS)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    stream = [token for token in STREAM if token != 2 or kind != "txt"] + [2]  # a .txt file is one document
    doubled = stream + stream
    for row in rows:
        assert row[0] == 1
        start = doubled.index(row[1]) if row[1] != 2 else doubled.index(row[2]) - 1
        assert doubled[start : start + 7] == row[1:] or doubled[start + len(stream) :][:7] == row[1:]
    assert len({tuple(row) for row in rows}) == 5
    for batch in batches:
        assert batch["labels"][:, 0].eq(-100).all()
        assert batch["labels"][:, 1:].equal(batch["input_ids"][:, 1:])
        assert batch["attention_mask"].eq(1).all()


@pytest.mark.parametrize("name", ["text.jsonl", "directory"])
def test_another_file_of_the_same_name_and_time_is_another_data_set(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (tmp_path / "directory").mkdir()
    file = path / "rows.jsonl" if name == "directory" else path
    found = []
    for text in ("before", "behind"):
        file.write_text(json.dumps({"text": text}))
        os.utime(file, (10**9, 10**9))  # as a clock that was set back, or a copy that keeps times, leaves it
        found.append(read_rows(str(path), "train")["text"][:])
    assert found == [["before"], ["behind"]]


def test_the_same_seed_draws_the_same_blocks(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data", "jsonl")
    first, again = (load_batches(path, tokenizer, **OPTIONS)[0]["input_ids"] for _ in range(2))
    assert first.equal(again)
    assert not first.equal(load_batches(path, tokenizer, **(OPTIONS | {"seed": 1}))[0]["input_ids"])


def test_tokenised_rows_are_used_as_they_are_and_padded(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": [-100] * (n - 1) + [2 + n]} for n in (4, 6, 12)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    (batch,) = load_batches(str(tmp_path / "data"), tokenizer, **(OPTIONS | {"batch_size": 3, "num_samples": 3}))
    assert sorted(batch["attention_mask"].sum(dim=1).tolist()) == [4, 6, 8]  # 12 are cut at max_seq_length
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert ids.tolist() == [*range(3, 3 + length)] + [0] * (8 - length)
        assert labels[: length - 1].eq(-100).all()
        assert labels[length:].eq(-100).all()


def test_questions_are_drawn_whole(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {
            "input_ids": [1, 5 + question, 9 + row],
            "labels": [-100, -100, 9 + row],
            "question": question,
            "is_answer": int(row == 1),
        }
        for question in range(6)
        for row in range(4)
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    batches = load_batches(str(tmp_path / "data"), tokenizer, **(OPTIONS | {"num_samples": 10, "batch_size": 3}))
    MultipleChoiceAccuracy().check(batches)
    assert sum(len(batch["question"]) for batch in batches) == 8


def test_fewer_samples_than_asked_for_are_told(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = load_batches(write(tmp_path / "data", "directory"), tokenizer, **(OPTIONS | {"num_samples": 99}))
    assert sum(len(batch["input_ids"]) for batch in batches) == 220 // 7
    assert "gives 31 samples where 99 were asked for" in caplog.text


def dataset_of(tmp_path: Path, columns: dict[str, Any]) -> str:
    Dataset.from_dict(columns).save_to_disk(str(tmp_path / "data"))
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": []}, {}, "cannot be read: it is empty"),
        (
            {"text": ["w1 w2"]},
            {},
            "too short: 3 tokens, and one sample takes 7; give more text, or a max_seq_length .--max-seq-length. of 3",
        ),
        ({"text": [None, ""]}, {}, "has no text in column text"),
        ({"a": ["w1"], "b": ["w2"]}, {}, "no column text, nor a single column of strings; its columns are a, b"),
        ({"n": [1]}, {}, "its columns are n: name the one"),
        ({"a": ["w1"], "b": ["w2"]}, {"text_column": "c"}, "no column 'c' of strings; its columns are a, b"),
        ({"text": TEXTS}, {"num_samples": 0}, "0 samples of 8 tokens in batches of 2 are impossible"),
        ({"text": TEXTS}, {"max_seq_length": 1}, "5 samples of 1 tokens in batches of 2 are impossible"),
        ({"input_ids": [[5], [6]]}, {}, r"too short: nothing to predict in 1 batches"),
    ],
)
def test_unusable_data_sets_are_refused(
    tmp_path: Path, tokenizer: Any, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_batches(dataset_of(tmp_path, columns), tokenizer, **(OPTIONS | options))


def test_the_named_column_is_read(tmp_path: Path, tokenizer: Any) -> None:
    path = dataset_of(tmp_path, {"text": ["w0"] * 20, "other": TEXTS})
    batches = load_batches(path, tokenizer, **OPTIONS, text_column="other")
    assert any(int(token) > 3 for token in batches[0]["input_ids"].flatten())


def test_data_that_cannot_be_read_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "data.docx").write_text("w1")
    with pytest.raises(DataError, match=r"has none of the endings \.json, \.jsonl, \.txt, \.csv, \.parquet"):
        load_batches(str(tmp_path / "data.docx"), tokenizer, **OPTIONS)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.csv").write_text("text\n")
    for name in ("empty.jsonl", "empty.csv"):
        with pytest.raises(DataError, match="cannot be read: it is empty"):
            load_batches(str(tmp_path / name), tokenizer, **OPTIONS)
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(DataError, match="broken.jsonl, split train, cannot be read: JSON parse error"):
        load_batches(str(tmp_path / "broken.jsonl"), tokenizer, **OPTIONS)
    with pytest.raises(DataError, match="nowhere, split train, cannot be read: it is no path here"):
        load_batches(str(tmp_path / "nowhere"), tokenizer, **OPTIONS)
    with pytest.raises(DataError, match=f"nowhere.jsonl: no such file in {tmp_path}"):
        load_batches(str(tmp_path / "nowhere.jsonl"), tokenizer, **OPTIONS)
    path = write(tmp_path / "splits", "splits")
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        load_batches(path, tokenizer, **(OPTIONS | {"split": "test"}))
