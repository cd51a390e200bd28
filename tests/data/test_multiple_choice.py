"""Questions of any data set, tokenised against a loop, stratified, and never reported on the split selected on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from amoeba_plugin.data.calibration import require_disjoint
from amoeba_plugin.data.multiple_choice import Question, QuestionColumns, load_questions, stratified
from amoeba_plugin.errors import DataError
from amoeba_plugin.modifiers import DepthShrinkingModifier, QuestionOptions
from amoeba_plugin.selection.objectives import MultipleChoiceAccuracy

COLOURS = ["red", "green", "blue", "none"]
MMLU = [{"question": f"question {i} ?", "choices": COLOURS, "answer": i % 4, "subject": f"s{i % 3}"} for i in range(12)]

MODEL = {"vocab_size": 5000}  # more than the tokenizer knows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so that texts can be read back."""
    vocabulary = {chr(code): code for code in range(32, 127)} | {"\n": 10, "<bos>": 1, "<pad>": 0}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", bos_token="<bos>")


def write(directory: Path, rows: list[dict[str, Any]], name: str = "questions") -> str:
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(batches: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    """Return prompt and choice as text, question and flag of every row."""
    found = []
    for batch in batches:
        for at, mask in enumerate(batch["attention_mask"].bool()):
            ids, labels = batch["input_ids"][at][mask].tolist(), batch["labels"][at][mask].tolist()
            assert ids[0] == 1  # BOS
            assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
            prompt = "".join(chr(token) for token, label in zip(ids[1:], labels[1:], strict=True) if label == -100)
            choice = "".join(chr(label) for label in labels if label != -100)
            found.append((prompt, choice, int(batch["question"][at]), int(batch["is_answer"][at])))
    return found


@pytest.mark.parametrize("letters", [True, False])
def test_every_choice_follows_its_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, letters: bool) -> None:
    path = write(tmp_path, MMLU)
    batches = load_questions(
        path, tokenizer, **MODEL, split="test", num_questions=12, seed=0, letters=letters, batch_size=5
    )
    MultipleChoiceAccuracy().check(batches)
    found, by_text = read(batches), {row["question"]: row for row in MMLU}
    assert len(found) == 48
    listed = "A. red\nB. green\nC. blue\nD. none\n" if letters else ""
    for at, (prompt, choice, question, is_answer) in enumerate(found):
        row = by_text[prompt.split("\n")[0]]
        assert prompt == f"{row['question']}\n{listed}Answer:"
        assert choice == f" {'ABCD'[at % 4] if letters else COLOURS[at % 4]}"
        assert question == at // 4
        assert is_answer == int(at % 4 == row["answer"])


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["x", "y"], "1", 1),
        (["x", "y"], "B", 1),
        (["x", "y"], "x", 0),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "1", 0),  # ARC has labels that are digits
        ({"text": ["x", "y"], "label": ["A", "B"]}, "B", 1),
    ],
)
def test_answers_are_read_in_whatever_form(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, choices: Any, answer: str, right: int
) -> None:
    path = write(tmp_path, [{"stem": "q", "endings": choices, "key": answer}])
    columns = QuestionColumns("stem", "endings", "key")
    batches = load_questions(path, tokenizer, **MODEL, split="test", num_questions=1, seed=0, columns=columns)
    assert [flag for *_, flag in read(batches)] == [int(at == right) for at in range(2)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 99))
def test_subjects_are_drawn_evenly(sizes: list[int], count: int, seed: int) -> None:
    pool = [Question(f"{s}.{i}", ("a", "b"), 0, str(s)) for s, size in enumerate(sizes) for i in range(size)]
    drawn = stratified(pool, count, seed)
    assert len(drawn) == len(set(drawn)) == min(count, len(pool))
    counts = Counter(question.subject for question in drawn)
    most = max(counts.values())
    assert all(counts[str(s)] >= min(size, most - 1) for s, size in enumerate(sizes))
    assert stratified(pool, count, seed) == drawn


def test_shots_are_answered_and_of_the_subject(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dev = [row | {"question": f"shot {i} ?"} for i, row in enumerate(MMLU)]
    DatasetDict({"test": Dataset.from_list(MMLU), "dev": Dataset.from_list(dev)}).save_to_disk(tmp_path / "mmlu")
    path, by_text = str(tmp_path / "mmlu"), {row["question"]: row for row in (*MMLU, *dev)}
    options = {"split": "test", "num_questions": 3, "seed": 0, "shots": 2, "shots_split": "dev"}
    for prompt, *_ in read(load_questions(path, tokenizer, **MODEL, **options)):
        *shots, asked = (part.split("\n") for part in prompt.split("\n\n"))
        assert len(shots) == 2
        for shot in shots:
            assert shot[-1] == f"Answer: {'ABCD'[by_text[shot[0]]['answer']]}"
            assert by_text[shot[0]]["subject"] == by_text[asked[0]]["subject"]
    short = load_questions(path, tokenizer, **MODEL, max_seq_length=120, **options)
    assert {prompt.count("shot") for prompt, *_ in read(short)} == {1}  # what is too long loses shots first
    with pytest.raises(DataError, match="more than the 20 of max_seq_length"):
        load_questions(path, tokenizer, **MODEL, max_seq_length=20, **options)
    with pytest.raises(DataError, match="2 shots need a split of their own, that of the questions is 'test'"):
        load_questions(path, tokenizer, **MODEL, **options | {"shots_split": "test"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": 0}, "no column choices; its columns are question, answer"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "row 0: the answer 2 is none of its 2 choices"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "row 0: the answer 0 is none of its 1 choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": "E"}, "the answer 'E' is none of its 2 choices"),
    ],
)
def test_rows_that_are_no_questions_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_questions(write(tmp_path, [row]), tokenizer, **MODEL, split="test", num_questions=1, seed=0)


def test_rows_that_were_selected_on_are_not_reported(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def load(name: str, rows: list[dict[str, Any]]) -> Any:
        return load_questions(
            write(tmp_path, rows, name), tokenizer, **MODEL, split="test", num_questions=len(rows), seed=0
        )

    selection = load("selection", MMLU[:6])
    require_disjoint(selection, load("rest", MMLU[6:]))
    with pytest.raises(DataError, match="4 of the rows to report on are among those that selection saw"):
        require_disjoint(selection, load("overlapping", MMLU[5:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_split": "validation"}, "selection and report both use split 'validation'"),
        ({"shots": 5, "shots_split": "test", "report_split": "test"}, "the shots come from split 'test'"),
        ({"shots": 5, "shots_split": "validation"}, "the shots come from split 'validation'"),
    ],
)
def test_splits_that_are_the_same_are_refused_when_the_recipe_is_parsed(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionOptions(dataset="mmlu", **options)


def test_questions_want_the_objective_accuracy() -> None:
    with pytest.raises(ValueError, match="questions mean nothing to objective loss; take objective: accuracy"):
        DepthShrinkingModifier(min_depth=2, questions={"dataset": "mmlu"})
