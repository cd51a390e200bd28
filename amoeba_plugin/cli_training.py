"""Commands of ``amoeba`` about training.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from amoeba_plugin.runtime.messages import done


def plan(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe with AdaptiveLayerTuningModifier, or a shipped one.")],
    model: Annotated[str, typer.Option(help="Path or hub id of the model that would be tuned.")],
    dataset: Annotated[str, typer.Option(help="Text to train on, as for `amoeba run`.")],
    memory: Annotated[str | None, typer.Option(help="The most of the process: 2GiB. Default: the recipe's.")] = None,
    deadline: Annotated[str | None, typer.Option(help="The most time: 20min. Default: the recipe's.")] = None,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="Sequences of the text.")] = 512,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draw of rows.")] = 42,
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="To compute in.")] = "auto",
) -> None:
    """Plan layer tuning on this machine: micro-batch, window and more, by a few steps that are measured."""
    from amoeba_plugin.recipes.inputs import RunOptions
    from amoeba_plugin.recipes.training_plan import plan_tuning

    options = RunOptions(num_samples=num_calibration_samples, max_seq_length=max_seq_length, seed=seed, dtype=dtype)
    done(f"planned: {plan_tuning(recipe, model, dataset, options, memory, deadline).in_words}")


COMMANDS = (plan,)
