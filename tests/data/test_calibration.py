"""Calibration batches are drawn once, completed and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.errors import DataError


def test_batches_are_drawn_once_and_completed() -> None:
    drawn = []

    def loader() -> Any:
        for number in range(2):
            drawn.append(number)
            yield {
                "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
                "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
                "text": ["five", "eight"],
            }

    batches = materialise(loader())
    assert drawn == [0, 1]
    assert [list(batch) for batch in batches] == [["input_ids", "attention_mask", "labels"]] * 2
    assert batches[0]["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]


def test_given_labels_and_numeric_columns_stay_and_lists_become_tensors() -> None:
    (batch,) = materialise(
        [{"input_ids": [[5, 6]], "labels": [[-100, 6]], "question": [3], "is_answer": [True]}], "cpu"
    )
    assert batch["labels"].tolist() == [[-100, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert (batch["question"].tolist(), batch["is_answer"].tolist()) == ([3], [True])


def test_after_left_padding_nothing_is_predicted_from_a_padded_position() -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    (batch,) = materialise([{"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": mask}])
    assert batch["labels"].tolist() == [[-100, -100, -100, 6]]


def test_the_loader_s_own_tensors_are_not_changed() -> None:
    given = {"input_ids": torch.tensor([[5, 6]])}
    batch = materialise([given])[0]
    assert list(given) == ["input_ids"]
    assert batch["labels"].data_ptr() != given["input_ids"].data_ptr()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "there is no calibration data: .* pass dataset="),
        ([], "the calibration data is empty; pass a data set with rows"),
        ([{"text": ["a"]}], "calibration batch 0 has no input_ids, only text; tokenise"),
        ([{}], "calibration batch 0 has no input_ids, only nothing"),
        ([{"input_ids": torch.tensor([5, 6])}], r"have shape \(2,\); \(batch, positions\) is wanted"),
        (
            [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5]])}],
            r"batch 0 has input_ids \(1, 2\) and labels \(1, 1\)",
        ),
        (
            [{"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1, 1]])}],
            r"batch 0 has input_ids \(1, 2\) and attention_mask \(1, 3\)",
        ),
        ([{"input_ids": torch.tensor([[5], [6]])}] * 3, r"nothing to predict in 3 batches, .* has 1 token\(s\)"),
        ([{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, -100]])}], "too short: nothing to predict"),
    ],
)
def test_missing_and_short_data_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        materialise(loader)


def test_sequences_of_one_token_are_told(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    with caplog.at_level("WARNING"):
        materialise([{"input_ids": torch.tensor([[5, 6, 7], [5, 0, 0], [0, 0, 0]]), "attention_mask": mask}])
    assert "2 of 3 calibration sequences have one token or none" in caplog.text
    caplog.clear()
    materialise([{"input_ids": torch.tensor([[5, 6]])}])
    assert not caplog.text
