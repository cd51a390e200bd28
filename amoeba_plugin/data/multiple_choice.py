"""Multiple-choice questions of any data set as batches for the objective ``accuracy``."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from string import ascii_uppercase
from typing import Any

from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.batch import IGNORED, Batch
from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.data.rows import collated
from amoeba_plugin.data.text import read_rows
from amoeba_plugin.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuestionColumns:
    """Where a data set keeps what: names of columns.

    Attributes:
        question: Text of the question.
        choices: A list of texts, or a mapping with ``text`` and ``label`` (ARC).
        answer: Index of the true choice (also as a digit), its label or letter, or its text.
        subject: What questions are stratified by, where the data set has such a column.
        context: What stands before the question, where the data set has such a column: a passage, examples.
    """

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    subject: str = "subject"
    context: str = "context"


@dataclass(frozen=True)
class Question:
    """One question as it was read: ``answer`` is the index of the true choice."""

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    context: str = ""

    @property
    def before(self) -> str:
        """The context as it stands before the question."""
        return f"{self.context}\n" if self.context else ""

    def prompt(self, letters: bool) -> str:
        """Return what stands before the answer: the context, the question, with ``letters`` its choices by letter, and
        "Answer:"."""
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(ascii_uppercase, self.choices, strict=False))
        return f"{self.before}{self.text}\n{listed if letters else ''}Answer:"

    def continuation(self, choice: int, letters: bool) -> str:
        """Return a choice as it follows the prompt."""
        return f" {ascii_uppercase[choice] if letters else self.choices[choice]}"


def load_questions(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    num_questions: int,
    vocab_size: int,
    seed: int,
    columns: QuestionColumns | None = None,
    letters: bool = True,
    shots: int = 0,
    shots_split: str | None = None,
    max_seq_length: int = 2048,
    batch_size: int = 8,
) -> list[Batch]:
    """Draw questions, the same number of each subject as far as there are any, and tokenise every choice.

    Args:
        dataset: Path or hub id, as in ``load_batches``.
        tokenizer: Of the model that is asked.
        split: Split of the questions.
        num_questions: How many; fewer where there are no more.
        vocab_size: Tokens of the model.
        seed: Same seed, same questions.
        columns: Names of the columns.
        letters: List the choices with letters and ask for the letter (MMLU); else ask for the text of the choice.
        shots: Answered questions in front of each one, of its subject where there are enough.
        shots_split: Split they come from; another than ``split``.
        max_seq_length: Tokens; a question that is longer loses shots first.
        batch_size: Rows, that is choices, per batch.

    Returns:
        Batches with ``input_ids``, ``attention_mask``, ``labels`` (-100 outside the choice), ``question`` and
        ``is_answer``.

    Raises:
        DataError: If a column is missing, an answer is none of its choices, a question does not fit, or ``shots_split``
            is the split of the questions.
    """
    columns = columns or QuestionColumns()
    if shots and shots_split in (None, split):
        raise DataError(
            f"{shots} shots need a split of their own, that of the questions is '{split}': else a question would be "
            "answered in its own prompt; name another in shots_split, such as dev or train"
        )
    chosen = stratified(read_questions(dataset, split, columns), num_questions, seed)
    if len(chosen) < num_questions:
        logger.warning("data set %s, split %s, has %d questions where %d were asked for", dataset, split, len(chosen),
                       num_questions)  # fmt: skip
    examples = read_questions(dataset, str(shots_split), columns) if shots else []
    rng = random.Random(seed)
    rows = []
    for number, question in enumerate(chosen):
        shown = _examples_for(question, examples, shots, rng)
        for choice in range(len(question.choices)):
            ids, target = _tokenised(question, choice, shown, tokenizer, letters, max_seq_length)
            labels = [IGNORED] * (len(ids) - target) + ids[len(ids) - target :]
            answer = int(choice == question.answer)
            rows.append({"input_ids": ids, "labels": labels, "question": number, "is_answer": answer})
    collate = PaddingCollator.padding_with(tokenizer.pad_token_id, vocab_size)
    batches = (collated(rows[start : start + batch_size], collate) for start in range(0, len(rows), batch_size))
    return materialise(batches, vocab_size=vocab_size)


def _examples_for(question: Question, examples: Sequence[Question], shots: int, rng: random.Random) -> list[Question]:
    """Draw answered questions, of the question's subject where there are enough."""
    same = [each for each in examples if each.subject == question.subject]
    pool = same if len(same) >= shots else examples
    return rng.sample(pool, min(shots, len(pool)))


def stratified(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Draw at random, in turn one of each subject, until there are enough.

    >>> few = [Question(str(number), ("a", "b"), 0, "rare" if number == 7 else "common") for number in range(9)]
    >>> sorted(question.subject for question in stratified(few, 4, seed=0))
    ['common', 'common', 'common', 'rare']
    """
    rng = random.Random(seed)
    shuffled = rng.sample(questions, len(questions))
    subjects: dict[str, list[Question]] = {}
    for question in shuffled:
        subjects.setdefault(question.subject, []).append(question)
    in_turn = chain.from_iterable(zip_longest(*subjects.values()))
    return [question for question in in_turn if question is not None][:count]


def read_questions(dataset: str, split: str, columns: QuestionColumns) -> list[Question]:
    """Return all questions of a split, in their order.

    Raises:
        DataError: If a column is missing, or an answer is none of its choices.
    """
    rows = read_rows(dataset, split)
    missing = [name for name in (columns.question, columns.choices, columns.answer) if name not in rows.column_names]
    if missing or not len(rows):
        raise DataError(
            f"data set {dataset}, split {split}, has {len(rows)} rows and no column {', '.join(missing) or '-'}; its "
            f"columns are {', '.join(rows.column_names)}: name those of question, choices and answer"
        )
    return [_question(row, columns, f"data set {dataset}, split {split}, row {at}") for at, row in enumerate(rows)]


def _question(row: Mapping[str, Any], columns: QuestionColumns, where: str) -> Question:
    given = row[columns.choices]
    if given is None or row[columns.question] is None:
        raise DataError(f"{where} has no question, or no choices; leave such rows out of the data set")
    texts = given["text"] if isinstance(given, Mapping) else given
    labels = given.get("label") if isinstance(given, Mapping) else None
    choices = tuple(str(text) for text in texts)
    answer = _answer(row[columns.answer], choices, labels or list(ascii_uppercase[: len(choices)]))
    if answer is None or not 2 <= len(choices) <= len(ascii_uppercase):
        raise DataError(
            f"{where}: the answer {row[columns.answer]!r} is none of its {len(choices)} choices; give an index from 0, "
            "a label or letter, or the text of one of two choices or more"
        )
    subject, context = (str(row.get(column) or "") for column in (columns.subject, columns.context))
    return Question(str(row[columns.question]), choices, answer, subject, context)


def _answer(given: Any, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    text = str(given).strip()
    if not isinstance(given, int) and text in labels:
        return list(labels).index(text)
    if not isinstance(given, int) and text in choices:
        return list(choices).index(text)
    return int(text) if text.isdecimal() and int(text) < len(choices) else None


def answered(examples: Sequence[Question], letters: bool) -> str:
    """Return questions with their answers, as they stand before another."""
    return "".join(f"{each.prompt(letters)}{each.continuation(each.answer, letters)}\n\n" for each in examples)


def _tokenised(
    question: Question,
    choice: int,
    shown: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    letters: bool,
    max_seq_length: int,
) -> tuple[list[int], int]:
    """Return the tokens of a choice in its prompt, and how many of them are the choice."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for first in range(len(shown) + 1):
        shots = answered(shown[first:], letters)
        context = tokenizer(shots + question.prompt(letters), add_special_tokens=False)["input_ids"]
        text = shots + question.prompt(letters) + question.continuation(choice, letters)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        same = next((at for at, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
        if len(bos) + len(whole) <= max_seq_length and same < len(whole):
            return [*bos, *whole], len(whole) - same
    raise DataError(
        f"the question '{question.text[:40]}...' has {len(bos) + len(whole)} tokens with its choice, more than the "
        f"{max_seq_length} of max_seq_length, or a choice that is no token; raise max_seq_length"
    )
