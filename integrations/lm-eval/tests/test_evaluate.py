"""``amoeba evaluate``, offline: what it writes, what it goes on with, what it says and what it refuses."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from amoeba_lm_eval import run
from amoeba_lm_eval.command import evaluate
from amoeba_lm_eval.results import Results
from amoeba_lm_eval.run import How, evaluate_subject
from amoeba_lm_eval.subjects import subject_of
from amoeba_lm_eval.table import notes_on, tables_of
from amoeba_lm_eval.tasks import ask_as, load_tasks, passages, requests_of
from rich.console import Console
from typer.testing import CliRunner

from amoeba_plugin.cli import AmoebaGroup
from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.errors import AmoebaError, ArchitectureError, ArtifactError, DataError, ShapeError
from amoeba_plugin.plugins.commands import offered_commands

PAGE = Path(__file__).parent.parent / "README.md"
TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: mcc}}]
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def amoeba(*arguments: object) -> Any:
    app = typer.Typer(cls=AmoebaGroup)
    app.callback()(lambda: None)
    app.command("evaluate")(evaluate)
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "160"})


def printed(results: Results) -> str:
    console = Console(width=160)
    with console.capture() as shown:
        for table in tables_of(results):
            console.print(table)
    return "\n".join([shown.get(), *notes_on(results)])


def scored(path: Path, output: Path, tasks: list[Path], shapes: str = "all", **how: Any) -> Results:
    return evaluate_subject(subject_of(str(path), shapes), [str(each) for each in tasks], output, How(**how), False)


def test_the_command_scores_shapes_and_says_what_cannot_be_ranked(files: Any, tmp_path: Path):
    done = amoeba(
        files.elastic, "--tasks", f"{files.questions},{files.text}", "--shapes", "4x1,3x1/2", "-o", tmp_path / "r.json",
        "--max-length", 64,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "questions: acc, of 8 documents (higher is better)" in done.output
    assert "minus 4x1" in done.output
    assert re.search(r"questions, acc: 4x1 and 3x1/2 cannot be ranked on these 8 documents", done.output)
    assert "4 scores, of every document, written to" in done.output
    assert "Running loglikelihood" not in done.output  # the harness keeps quiet
    found = Results.load(tmp_path / "r.json")
    assert [(each.shape, each.task) for each in found.scores] == [
        ("4x1", "questions"), ("4x1", "text"), ("3x1/2", "questions"), ("3x1/2", "text")
    ]  # fmt: skip
    right = found.scores[0].metrics["acc"]
    assert set(right.values) <= {0.0, 1.0}
    estimate = next(each for each in found.estimates if (each.metric, each.shape) == ("acc", "4x1"))
    assert estimate.value == np.mean(right.values)
    assert estimate.interval[0] <= estimate.value <= estimate.interval[1]
    words = found.scores[1].metrics["word_perplexity"]
    texts = [json.loads(line)["text"] for line in files.text.read_text().splitlines()]
    assert words.weights == [len(text.split()) for text in texts]
    assert found.scores[1].metrics["bits_per_byte"].weights == [len(text.encode()) for text in texts]
    assert found.scores[1].metrics["token_perplexity"].weights[0] > words.weights[0]


def test_the_shape_in_the_results_is_the_subnet_of_that_shape(files: Any, tmp_path: Path):
    tasks = [files.questions, files.text]
    elastic = scored(files.elastic, tmp_path / "e.json", tasks, "3x1/2,2x3/4").of_task("text")
    subnet = scored(files.subnet, tmp_path / "s.json", tasks)
    found, other = (each.metrics["bits_per_byte"].values for each in elastic)
    assert found == pytest.approx(subnet.of_task("text")[0].metrics["bits_per_byte"].values, abs=1e-3)
    assert max(abs(one - two) for one, two in zip(found, other, strict=True)) > 1
    assert subnet.shapes == ["subnet"]
    assert "minus" not in printed(subnet)


@pytest.mark.parametrize("after", [1, 3])
def test_what_was_stopped_goes_on_to_the_same_file(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    ask = {"tasks": [files.questions, files.text], "shapes": "4x1,3x1/2", "limit": 4, "num_fewshot": 1}
    whole = tmp_path / "whole.json"
    scored(files.elastic, whole, **ask)
    score, count = run._score, []

    def stopping(*arguments: Any) -> Any:
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(arguments)
        return score(*arguments)

    monkeypatch.setattr(run, "_score", stopping)
    with pytest.raises(KeyboardInterrupt):
        scored(files.elastic, tmp_path / "half.json", **ask)
    assert len(Results.load(tmp_path / "half.json").scores) == after
    calls = []
    monkeypatch.setattr(run, "_score", lambda *arguments: calls.append(arguments) or score(*arguments))
    scored(files.elastic, tmp_path / "half.json", **ask)
    assert len(calls) == 4 - after
    assert (tmp_path / "half.json").read_bytes() == whole.read_bytes()
    scored(files.elastic, tmp_path / "half.json", **ask)
    assert len(calls) == 4 - after  # nothing is left, and nothing is loaded


def test_more_shapes_and_tasks_extend_what_is_there(files: Any, tmp_path: Path):
    output = tmp_path / "r.json"
    scored(files.elastic, output, [files.questions], "3x1/2", limit=3)
    first = Results.load(output).scores[0]
    found = scored(files.elastic, output, [files.questions, files.text], "4x1", limit=3)
    assert found.shapes == ["4x1", "3x1/2"]
    assert first in found.scores
    assert len(found.scores) == 3
    assert "minus 4x1" in printed(found)


def test_results_of_something_else_are_refused(files: Any, tmp_path: Path):
    output = tmp_path / "r.json"
    scored(files.elastic, output, [files.questions], "3x1/2", limit=3)
    before = output.read_bytes()
    with pytest.raises(ArtifactError, match=r"other: limit \(3, now 4\), num_fewshot \(None, now 1\); name another"):
        scored(files.elastic, output, [files.questions], "3x1/2", limit=4, num_fewshot=1)
    with pytest.raises(ArtifactError, match=r"model \(elastic checkpoint, now model\), files of the model"):
        scored(files.subnet, output, [files.questions], limit=3)
    other = tmp_path / "other" / "questions.jsonl"
    other.parent.mkdir()
    other.write_text(files.questions.read_text().replace("Water", "Wine"))
    with pytest.raises(ArtifactError, match="other questions named questions"):
        scored(files.elastic, output, [other], "3x1/2", limit=3)
    assert output.read_bytes() == before
    output.write_text("{}")
    with pytest.raises(ArtifactError, match="is not a file of `amoeba evaluate`"):
        scored(files.elastic, output, [files.questions], "3x1/2", limit=3)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("", "no task is named"),
        ("there_is_none.jsonl", "there_is_none.jsonl: no such file"),
        ("there_is_none.yaml", "there_is_none.yaml: no such file"),
        ("{questions},{questions}", "questions is asked for twice"),
        ("arc_eazy", "lm_eval has no task 'arc_eazy'. Did you mean 'arc_easy'?"),
        ("{other}", "has no column text, nor a single column of strings"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_loads(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: str, message: str
):
    monkeypatch.setattr("amoeba_plugin.elastic.checkpoint.load_elastic", pytest.fail)
    (tmp_path / "other.jsonl").write_text(json.dumps({"one": "a", "two": "b"}) + "\n")
    named = tasks.format(questions=files.questions, other=tmp_path / "other.jsonl")
    done = amoeba(files.elastic, "--tasks", named, "-o", tmp_path / "r.json")
    assert done.exit_code == 2
    assert message in done.output.replace("\n", "")
    assert not (tmp_path / "r.json").exists()


def test_a_model_has_one_shape_and_no_more_room_than_it_was_made_for(files: Any, tmp_path: Path):
    with pytest.raises(ShapeError, match="is no elastic checkpoint, so that it has one shape only"):
        subject_of(str(files.subnet), "3x1/2")
    with pytest.raises(ShapeError, match="9x1"):
        subject_of(str(files.elastic), "9x1")
    with pytest.raises(ArchitectureError, match="there is no such directory"):
        subject_of(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="--max-length 600 is more than .* was made for, 512 tokens"):
        scored(files.subnet, tmp_path / "r.json", [files.questions], max_length=600)
    with pytest.raises(DataError, match="questions cannot be asked so"):
        scored(files.subnet, tmp_path / "r.json", [files.questions], num_fewshot=8)  # of eight, one is asked


def test_written_answers_are_not_asked_of_an_engine(files: Any, tmp_path: Path):
    deploy_shape(files.elastic, "3x1/2", "torch:fp32", tmp_path / "out")
    task = tmp_path / "writes.yaml"
    task.write_text(
        TASK.format(file=files.questions).replace("multiple_choice", "generate_until")
        .replace("doc_to_choice: choices\n", "").replace(", {metric: mcc}", "")
        .replace("doc_to_target: gold", 'doc_to_target: "{{gold}}"').replace("metric: acc,", "metric: exact_match,")
    )  # fmt: skip
    with pytest.raises(DataError, match="wants written answers, and a deployed subnet is scored by its probabilities"):
        scored(tmp_path / "out", tmp_path / "r.json", [task])
    found = scored(files.elastic, tmp_path / "e.json", [task], "3x1/2", limit=1).scores[0]
    assert found.metrics["exact_match"].values == [0.0]


def test_a_task_of_the_harness_scores_as_its_file_does_and_what_has_no_interval_is_named(files: Any, tmp_path: Path):
    task = tmp_path / "local.yaml"
    task.write_text(TASK.format(file=files.questions))
    found = scored(files.elastic, tmp_path / "r.json", [task, files.questions], "3x1/2")
    one, other = (found.of_task(name)[0].metrics["acc"] for name in ("local", "questions"))
    assert one == other
    assert "local: no interval can be had of mcc, which are left out" in printed(found)


def test_whether_a_choice_is_the_likeliest_is_asked_where_a_metric_may_say_so(files: Any, tmp_path: Path):
    (tmp_path / "local.yaml").write_text(TASK.format(file=files.questions).replace("mcc", "exact_match"))
    tasks = load_tasks([str(files.questions), str(files.text), str(tmp_path / "local.yaml")], len)
    assert {name: run._needs_likeliest(task) for name, task in tasks.items()} == {
        "questions": False, "text": True, "local": True
    }  # fmt: skip


def test_examples_are_the_same_at_every_shape_and_never_the_question_itself(files: Any, tmp_path: Path):
    task = load_tasks([str(files.questions)], len)["questions"]
    asks: Callable[[int], list[str]] = lambda seed: (  # noqa: E731
        ask_as(task, 2, seed), requests_of("questions", task, None), [each.args[0] for each in task.instances]
    )[-1]  # fmt: skip
    first = asks(0)
    assert first == asks(0)
    assert first != asks(1)
    for prompt in first:
        *shown, question = prompt.split("\n\n")
        assert len(shown) == 2
        assert all(not each.startswith(question) for each in shown)
        assert all(re.search(r"\nAnswer: (red|a stone in the sea|17)$", each) for each in shown)


def test_both_names_of_columns_ask_the_same(files: Any, tmp_path: Path):
    rows = [json.loads(line) for line in files.questions.read_text().splitlines()]
    renamed = [{"question": row["query"], "choices": row["choices"], "answer": "AB"[row["gold"]]} for row in rows]
    other = tmp_path / "questions.jsonl"
    other.write_text("".join(f"{json.dumps(row)}\n" for row in renamed))
    digests = []
    for path in (files.questions, other):
        task = load_tasks([str(path)], len)["questions"]
        ask_as(task, None, 0)
        digests.append(requests_of("questions", task, None))
    assert digests[0] == digests[1]


def test_a_text_file_is_cut_into_passages_and_nothing_of_it_is_lost(files: Any, tmp_path: Path):
    text = "".join(f"Line {number} of a text.\n" + "\n" * (number % 3 == 0) for number in range(400))
    assert "".join(passages(text)) == text
    assert min(map(len, passages(text)[:-1])) >= 2000
    assert all(each.endswith("\n\n") for each in passages(text)[:-1])
    assert "".join(passages(text.replace("\n\n", "\n"))) == text.replace("\n\n", "\n")
    assert passages("one line") == ["one line"]
    (tmp_path / "short.txt").write_text("One line alone.")
    found = scored(files.subnet, tmp_path / "r.json", [tmp_path / "short.txt"], max_length=32)
    assert found.estimates[0].interval is None
    assert "short has one document: nothing to resample, no interval" in printed(found)


def test_questions_that_were_cut_are_told(files: Any, tmp_path: Path):
    found = scored(files.subnet, tmp_path / "r.json", [files.questions], num_fewshot=4, max_length=32)
    assert found.scores[0].cut == 20
    assert "questions: of 20 requests the model did not see the beginning" in printed(found)


def test_errors_of_the_command_line_are_those_of_the_core(files: Any, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for model in (tmp_path, tmp_path / "file"):
        done = amoeba(model, "--tasks", files.questions, "-o", tmp_path / "r.json")
        assert done.exit_code == 2
        assert done.output.startswith("error: ")
        assert isinstance(done.exception, SystemExit)
    assert issubclass(DataError, AmoebaError)


def test_it_is_found_by_its_entry_point():
    if "amoeba-lm-eval" not in {each.name for each in importlib.metadata.distributions()}:
        pytest.skip("runs from a source tree that is not installed")
    assert "evaluate" in {each.name for each in offered_commands()}
    assert next(each for each in offered_commands() if each.name == "evaluate").function is evaluate


def test_commands_that_the_page_prints_exist():
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines() if line.startswith("amoeba evaluate")]
    help_text = amoeba("--help").output
    assert len(lines) >= 3
    for words in lines:
        for option in (word for word in words if word.startswith("-")):
            assert option in help_text
