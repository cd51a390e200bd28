"""What is asked of a model: tasks of lm_eval by name, or made of local files, which need no hub.

A file of questions is one that the objective ``accuracy`` reads: columns ``question`` (or ``query``), ``choices`` and
``answer`` (or ``gold``). A file of text has a column ``text``, or a single column of strings; of a ``.txt``, passages
of whole paragraphs are documents.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from amoeba_plugin.data.multiple_choice import QuestionColumns, read_questions
from amoeba_plugin.data.text import FILE_FORMATS, read_rows, read_text, require_file
from amoeba_plugin.errors import DataError, did_you_mean

PASSAGE = 2000  # characters, at least, of a document of a .txt: one document could not be resampled
QUESTIONS, ANSWERS = ("question", "query"), ("answer", "gold")
TASK_FILES = (".yaml", ".yml")
LONGEST_REASON = 300
Count = Callable[[str], int]


def load_tasks(names: Sequence[str], count_tokens: Count) -> dict[str, Task]:
    """Return tasks by name, in the order asked for; a group of lm_eval is its tasks.

    Args:
        names: Of lm_eval, or paths.
        count_tokens: Tells how many tokens the model makes of a text; asked when text is scored.

    Raises:
        DataError: If there is no such task or file, two have one name, or data cannot be had.
    """
    if not names:
        raise DataError("no task is named; give names of lm_eval or files in --tasks, separated by commas")
    found: dict[str, Task] = {}
    manager: TaskManager | None = None
    for name in names:
        path = Path(name)
        if path.suffix in FILE_FORMATS:
            tasks: Mapping[str, Task] = {path.stem: _of_file(name, count_tokens)}
        else:
            manager = manager or _manager(names)
            tasks = _of_harness(name, manager)
        twice = sorted(tasks.keys() & found.keys())
        if twice:
            raise DataError(f"{twice[0]} is asked for twice in --tasks; name it once, or give its file another name")
        found.update(tasks)
    return found


def ask_as(task: Task, num_fewshot: int | None, seed: int) -> None:
    """Set how a task is asked, as lm_eval's own command does; a task that is to have no examples keeps that."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)


def requests_of(name: str, task: Task, limit: int | None) -> tuple[str, int]:
    """Return the digest of all that a task will ask, and how many requests that are.

    Raises:
        DataError: If it cannot be asked so.
    """
    with quiet():
        try:
            task.build_all_requests(limit=limit)
        except Exception as error:  # templates, samplers and data of a task raise anything
            raise DataError(f"task {name} cannot be asked so: {_reason(error)}") from error
    digest = hashlib.sha256(f"{task.OUTPUT_TYPE} {task.VERSION}".encode())
    for instance in task.instances:
        digest.update(json.dumps([instance.doc_id, *instance.args], default=str).encode())
    return digest.hexdigest(), len(task.instances)


@contextmanager
def quiet() -> Iterator[None]:
    """Let the harness print nothing for a block of code: it has bars and lines of its own, at every step."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        yield


def _manager(names: Sequence[str]) -> TaskManager:
    """Return what knows tasks by name; to list all those of lm_eval takes seconds, which files do not need."""
    needed = any(Path(name).suffix not in (*FILE_FORMATS, *TASK_FILES) for name in names)
    with quiet():
        return TaskManager(include_defaults=needed)


def _of_harness(name: str, manager: TaskManager) -> Mapping[str, Task]:
    path = Path(name)
    is_file = path.suffix in TASK_FILES
    if is_file and not path.is_file():
        raise DataError(f"task {name}: no such file in {path.absolute().parent}; name one that is there")
    if not is_file and name not in manager.task_index:
        raise DataError(
            f"lm_eval has no task '{name}'.{did_you_mean(name, manager.all_tasks)} Name one of its tasks, or a file "
            f"({', '.join([*FILE_FORMATS, TASK_FILES[0]])})"
        )
    try:
        with quiet():
            loaded: dict[str, Task] = manager.load([name])["tasks"]
    except Exception as error:  # of data, hubs and configurations comes anything
        raise DataError(
            f"task {name} cannot be loaded ({_reason(error)}). Its data come from the hub, unless they are in the "
            "cache; a file of questions or text needs neither"
        ) from error
    return loaded


def _of_file(name: str, count_tokens: Count) -> ConfigurableTask:
    require_file(name)
    with quiet():
        columns = read_rows(name, "train").column_names
    question = next((each for each in QUESTIONS if each in columns), None)
    answer = next((each for each in ANSWERS if each in columns), None)
    if question and answer and "choices" in columns:
        return _questions(name, QuestionColumns(question=question, answer=answer))
    return _text(name, count_tokens)


def _questions(name: str, columns: QuestionColumns) -> ConfigurableTask:
    """Return multiple choice as lm_eval asks it: the likelihood of each choice's text behind the question."""
    found = read_questions(name, "train", columns)
    rows = [
        {"prompt": each.prompt(letters=False), "choices": list(each.choices), "gold": each.answer} for each in found
    ]
    metrics = [{"metric": each, "aggregation": "mean", "higher_is_better": True} for each in ("acc", "acc_norm")]
    return _task(
        name, rows, output_type="multiple_choice", doc_to_text="prompt", doc_to_choice="choices", doc_to_target="gold",
        fewshot_split="test", metric_list=metrics,
    )  # fmt: skip


def _text(name: str, count_tokens: Count) -> ConfigurableTask:
    rows, column = read_text(name, "train", None)
    if column is None:
        raise DataError(f"{name} has tokens, of which nobody knows what text they were; give text")
    texts = passages(rows[0][column]) if Path(name).suffix == ".txt" else [text for text in rows[column] if text]
    if not any(text.strip() for text in texts):
        raise DataError(f"{name} has no text in its column {column}; give one that has")

    def process_results(doc: Mapping[str, str], results: Sequence[float]) -> dict[str, tuple[float, int]]:
        (likelihood,), text = results, doc["text"]
        size = len(text.encode())
        return {
            "word_perplexity": (likelihood, max(len(text.split()), 1)), "byte_perplexity": (likelihood, size),
            "bits_per_byte": (likelihood, size), "token_perplexity": (likelihood, max(count_tokens(text), 1)),
        }  # fmt: skip

    metrics = [
        {"metric": each, "aggregation": "bits_per_byte" if "bits" in each else "weighted_perplexity",
         "higher_is_better": False}
        for each in ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity")
    ]  # fmt: skip
    return _task(
        name, [{"text": text} for text in texts], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="text", process_results=process_results, metric_list=metrics,
    )  # fmt: skip


def _task(name: str, rows: list[dict[str, Any]], **config: Any) -> ConfigurableTask:
    data = {"test": Dataset.from_list(rows)}
    with quiet():
        return ConfigurableTask(
            config={"task": Path(name).stem, "custom_dataset": lambda **_: data, "test_split": "test", **config}
        )


def passages(text: str, length: int = PASSAGE) -> list[str]:
    """Cut text at blank lines, or where there are none at lines, into passages of so many characters or more.

    >>> passages("One.\\n\\nTwo two.\\n\\nThree.\\n", 5)
    ['One.\\n\\nTwo two.\\n\\n', 'Three.\\n']
    """
    ends = re.compile(r"\n[^\S\n]*\n|\Z" if re.search(r"\n[^\S\n]*\n", text) else r"\n|\Z")
    found, start = [], 0
    for end in (match.end() for match in ends.finditer(text)):
        if end - start >= length or (end == len(text) and end > start):
            found.append(text[start:end])
            start = end
    return found


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return words if len(words) < LONGEST_REASON else f"{words[:LONGEST_REASON]} ..."
