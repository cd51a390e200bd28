"""Commands of ``amoeba`` about serving requests within their targets.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amoeba_plugin.runtime.messages import done, say


def tune_decisions(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint: what elastic_dir in a recipe named.")],
    questions: Annotated[str, typer.Option(help="Multiple-choice questions like those to come, to train on.")],
    output: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the compact model goes: new or empty.")],
    split: Annotated[str, typer.Option(help="Split of the data set; a file is one split.")] = "train",
    num_questions: Annotated[int, typer.Option(min=1, help="Questions, at most.")] = 200,
    shots: Annotated[
        int, typer.Option(min=0, help="Of the questions, how many stand answered before each of the others.")
    ] = 0,
    letters: Annotated[
        bool, typer.Option("--letters/--no-letters", help="Ask for a choice's letter, or for its text.")
    ] = False,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt with a choice, at most.")] = 1024,
    labels: Annotated[
        str, typer.Option(help="Of tokens: self_information by the smallest subnet, or saliency by the whole model.")
    ] = "self_information",
    shapes: Annotated[str, typer.Option(help="That are tried: 12x1,8x1/2. Default: at most nine of them.")] = "",
    seed: Annotated[int, typer.Option(help="Of the draw, weights and order.")] = 0,
    encoder: Annotated[
        str,
        typer.Option(
            help="Encoder that reads prompts, such as google/mobilebert-uncased@refs/pr/8: a hub id, or a path. "
            "Default: the elastic model's own first layers do."
        ),
    ] = "",
    base: Annotated[str | None, typer.Option(help="Where ELASTIC's base model is now, if it moved.")] = None,
) -> None:
    """Train the compact model that reads prompts, shortens them, and chooses shapes for `dual_head`."""
    from amoeba_plugin.serving.compact.tune import Asked, tune_decisions
    from amoeba_plugin.shape import SubnetShape

    tried = tuple(SubnetShape.parse(shape) for shape in shapes.split(",") if shape)
    asked = Asked(
        questions, split, num_questions, shots, letters, max_seq_length, labels, tried, seed=seed, encoder=encoder
    )
    tuned = tune_decisions(elastic, output, asked, base)
    say(
        f"{tuned.questions} questions, {tuned.cpu_seconds:.0f} CPU s; scores explain {tuned.explained:.0%} of held-out "
        f"labels, an answer costs {tuned.nats:.3f} nats to foresee"
    )
    done(f"compact model written to {output}")


COMMANDS = (tune_decisions,)
