"""``amoeba evaluate``: parses what it is given, and prints what came of it; what is heavy is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amoeba_plugin.runtime.messages import done, say


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Path or hub id of a model; an elastic checkpoint; or what `amoeba deploy` wrote.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="lm_eval's names, or files: questions or text (.jsonl, .json, .csv, .parquet), .txt, a task's .yaml."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Results, a JSON file; one there is gone on with.")],
    shapes: Annotated[str, typer.Option(help="Of an elastic checkpoint: all, or 30x1,24x2/3.")] = "all",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, the first ones.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Answered documents in front of each. Default: the task's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of few-shot examples and intervals.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens that the model sees at most. Default: its own, up to 1024.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time; an engine takes one.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine that runs a deployed subnet.")] = 1,
    base: Annotated[str | None, typer.Option(help="Where ELASTIC's base model is now, if it moved.")] = None,
) -> None:
    """Score a model, every shape of an elastic one, or a deployed subnet in its own engine, by lm_eval."""
    from amoeba_lm_eval.run import How, evaluate_subject
    from amoeba_lm_eval.subjects import subject_of
    from amoeba_lm_eval.table import notes_on, tables_of

    subject = subject_of(model, shapes, base)
    how = How(limit, num_fewshot, seed, max_length, batch_size, threads)
    found = evaluate_subject(subject, [each.strip() for each in tasks.split(",") if each.strip()], output, how)
    for table in tables_of(found):
        Console().print(table)
    for note in notes_on(found):
        say(note)
    done(f"{len(found.scores)} scores, of every document, written to {output}")
