"""What is no token of the model is refused with the row that has it; rows without tokens are skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.data.collator import PaddingCollator, require_targets
from amoeba_plugin.data.multiple_choice import load_questions
from amoeba_plugin.data.text import load_batches
from amoeba_plugin.data.tokens import require_tokens
from amoeba_plugin.errors import DataError
from support.models import make_tiny_model
from support.training import make_elastic, make_trainer

VOCABULARY = 97
NO_TOKENS: list[tuple[Any, str]] = [
    ([5, 97, 6], "input_ids holds the token 97 at position 1, and the model has 0 to 96"),
    ([5, 6, -1], "input_ids holds the token -1 at position 2"),
    ([5, 6, -100], "input_ids holds the token -100 at position 2"),
    (["a", "b"], r"input_ids are no numbers, .*: \['a'\]"),
    ("5 6 7", "input_ids are no numbers, .*: '5 6 7'"),
    ([5.0, 6.5], r"input_ids are no whole numbers: \[5.0\]"),
    ([True, False], r"input_ids are no whole numbers: \[True\]"),
    ([2**70], "input_ids are no numbers"),
    (None, "input_ids are no numbers, .*: None"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def load(path: Path, tokenizer: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    fields = {"split": "train", "num_samples": 4, "max_seq_length": 8, "batch_size": 2, "seed": 0}
    return load_batches(str(path), tokenizer, **(fields | {"vocab_size": VOCABULARY} | options))


def saved(directory: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).save_to_disk(str(directory))
    return directory


@pytest.mark.parametrize(("ids", "message"), NO_TOKENS)
def test_no_tokens_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"row 7: {message}"):
        require_tokens(ids, "input_ids", "row 7", VOCABULARY)


@pytest.mark.parametrize(("ids", "message"), [case for case in NO_TOKENS if case[0] != [2**70]])
def test_a_data_set_names_its_row(tmp_path: Path, tokenizer: Any, ids: Any, message: str) -> None:
    alike = ids if isinstance(ids, str) else [type(ids[0])(5)] * 3 if ids and type(ids[0]) is not int else [5, 6, 7]
    path = saved(tmp_path / "data", [{"input_ids": alike}, {"input_ids": ids}])
    row = 1 if isinstance(alike, list) and type(alike[0]) is int else r"\d"
    with pytest.raises(DataError, match=f"data set .*data, split train, row {row}: {message.partition(':')[0]}"):
        load(path, tokenizer)


def test_labels_are_tokens_or_none() -> None:
    assert require_tokens([-100, 96], "labels", "row 0", VOCABULARY).tolist() == [-100, 96]
    for wrong in (97, -1, -101):
        with pytest.raises(DataError, match=f"row 0: labels holds the token {wrong} at position 1"):
            require_tokens([5, wrong], "labels", "row 0", VOCABULARY)


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_a_host_s_batches_name_their_row(column: str) -> None:
    good = {"input_ids": torch.tensor([[5, 6], [7, 96]]), "labels": torch.tensor([[-100, 6], [7, 96]])}
    assert materialise([good], vocab_size=VOCABULARY)[0]["input_ids"].equal(good["input_ids"])
    with pytest.raises(DataError, match=f"calibration batch 1, row 1: {column} holds the token 97 at position 1"):
        materialise([good, good | {column: torch.tensor([[5, 6], [7, 97]])}], vocab_size=VOCABULARY)
    with pytest.raises(DataError, match="batch 0: input_ids are no numbers, in lists of the same length"):
        materialise([{"input_ids": [[1, 2], [3]]}])
    with pytest.raises(DataError, match="batch 0: attention_mask are no numbers"):
        materialise([good | {"attention_mask": [["a", "b"], ["c", "d"]]}])


def test_ids_of_any_integer_type_become_the_one_that_losses_take() -> None:
    (batch,) = materialise([{"input_ids": torch.tensor([[5, 6]], dtype=torch.int32)}])
    assert (batch["input_ids"].dtype, batch["labels"].dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize(("ids", "message"), [case for case in NO_TOKENS if isinstance(case[0], list)])
def test_a_training_batch_names_its_row(ids: list[Any], message: str) -> None:
    rows = [{"input_ids": [5], "labels": [5]}, {"input_ids": ids, "labels": [5] * len(ids)}]
    with pytest.raises(DataError, match=f"row 1 of a batch: {message}"):
        PaddingCollator(0, VOCABULARY)(rows)


def test_the_first_training_row_is_looked_at_before_the_first_step() -> None:
    with pytest.raises(DataError, match="training row 0: labels are no numbers"):
        require_targets([{"input_ids": [5, 6], "labels": ["a", "b"]}])


def test_a_trainer_refuses_what_its_model_has_no_embedding_of(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 61, 6], "labels": [5, 6, 7]}] * 8  # of a model of 61 tokens
    trainer = make_trainer(make_elastic(), tmp_path, rows=rows)  # with a collator that knows no model
    with pytest.raises(DataError, match=r"a training batch, row 0: input_ids holds the token 61 at position 1"):
        trainer.train()


def test_a_padding_token_that_the_model_lacks_is_not_padded_with(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == VOCABULARY
    path = saved(tmp_path / "data", [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    (batch,) = load(path, tokenizer)
    assert sorted(batch["input_ids"].tolist()) == [[5, 6, 7], [8, 9, 0]]


def test_text_of_another_model_s_tokenizer_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "data.txt").write_text(" ".join(f"w{number % 97}" for number in range(200)))
    assert load(tmp_path / "data.txt", tokenizer)
    with pytest.raises(DataError, match=r"the model has 0 to 30; tokenise the data with this model's own tokenizer"):
        load(tmp_path / "data.txt", tokenizer, vocab_size=31)


def test_empty_texts_are_skipped_and_counted_once(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [" ".join(f"w{10 * row + word}" for word in range(9)) for row in range(8)]
    full, holed = tmp_path / "full.jsonl", tmp_path / "holed.jsonl"
    full.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    holed.write_text("".join(json.dumps({"text": text}) + "\n" for pair in zip(texts, ["", None] * 4, strict=True)
                             for text in pair))  # fmt: skip
    options = {"num_samples": 10, "max_seq_length": 10, "batch_size": 10}
    (expected,) = load(full, tokenizer, **options)
    assert "are empty" not in caplog.text
    (found,) = load(holed, tokenizer, **options)
    assert sorted(found["input_ids"].tolist()) == sorted(expected["input_ids"].tolist())
    assert [each.getMessage() for each in caplog.records if "are empty" in each.getMessage()] == [
        f"data set {holed}: 8 of the 16 rows read are empty and were skipped"
    ]


def test_empty_rows_of_tokens_are_replaced_by_others_and_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"input_ids": [5 + index, 6, 7] if index % 2 else []} for index in range(20)]
    batches = load(saved(tmp_path / "data", rows), tokenizer, num_samples=6)
    drawn = [row[0] for batch in batches for row in batch["input_ids"].tolist()]
    assert len(set(drawn)) == 6
    assert all(first % 2 == 0 for first in drawn)
    assert "rows read are empty and were skipped" in caplog.text
    with pytest.raises(DataError, match="no row has a token"):
        load(saved(tmp_path / "none", [{"input_ids": []}] * 3), tokenizer)


def test_rows_beside_a_column_of_question_texts_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 0: the column question holds 'why'"):
        load(saved(tmp_path / "data", [{"input_ids": [5, 6], "question": "why"}]), tokenizer)


def test_a_question_without_choices_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "w1", "choices": ["w2", "w3"], "answer": 0}, {"question": "w1", "choices": None, "answer": 0}]
    path = saved(tmp_path / "data", rows)
    with pytest.raises(DataError, match="row 1 has no question, or no choices"):
        load_questions(str(path), tokenizer, vocab_size=VOCABULARY, split="train", num_questions=2, seed=0)


def test_the_collator_of_a_model_knows_its_tokens() -> None:
    config = make_tiny_model("llama").config
    assert PaddingCollator.of(config) == PaddingCollator(0, VOCABULARY)
    config.pad_token_id = VOCABULARY
    assert PaddingCollator.of(config).pad_token_id == 0
