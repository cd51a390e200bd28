"""Which shapes an evaluation measures, what their metrics are called, and which of them the best checkpoint goes by."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from amoeba_plugin.errors import ShapeError, TrainingError
from amoeba_plugin.shape import ShapeSpace, SubnetShape

EvalShapes = Sequence[SubnetShape | str] | Literal["all"] | None
NOT_OF_THE_MODEL = ("_model_preparation_time", "_jit_compilation_time")  # what Trainer's loop puts beside the metrics


def shapes_to_measure(space: ShapeSpace, asked: EvalShapes) -> tuple[SubnetShape, ...]:
    """Return the shapes that every evaluation measures, beside the active one.

    Raises:
        ShapeError: If the space does not hold one of them.
    """
    if asked is None:
        return space.largest, space.smallest
    if isinstance(asked, str):
        if asked != "all":
            raise ShapeError(f"eval_shapes '{asked}': give a list of shapes, or all")
        return tuple(space)
    return tuple(space.require(shape) for shape in asked)


def of_shape(metrics: Mapping[str, float], shape: SubnetShape) -> dict[str, float]:
    """Return metrics of one shape under names that say so.

    >>> of_shape({"eval_loss": 2.5, "eval_model_preparation_time": 0.1}, SubnetShape.parse("10x7/8"))
    {'eval_loss_10x7/8': 2.5}
    """
    return {f"{name}_{shape}": value for name, value in metrics.items() if not name.endswith(NOT_OF_THE_MODEL)}


def with_direction(arguments: TrainingArguments, measured: Sequence[SubnetShape]) -> TrainingArguments:
    """Return arguments by which a lower loss of a shape is better.

    transformers takes metrics for better the greater they are, unless their names end in "loss".

    Args:
        arguments: Trainer's.
        measured: The shapes that evaluations during the training measure.

    Raises:
        TrainingError: If ``metric_for_best_model`` is of a shape that is not measured.
    """
    metric, _, end = (arguments.metric_for_best_model or "").rpartition("_")
    if "x" not in end:  # top_5 is no shape
        return arguments
    try:
        shape = SubnetShape.parse(end)
    except ShapeError:
        return arguments
    if str(shape) != end or shape not in measured:
        raise TrainingError(
            f"metric_for_best_model '{arguments.metric_for_best_model}' is not measured: evaluations have "
            f"{', '.join(f'{metric}_{each}' for each in measured)}; take one of these, or name the shape in eval_shapes"
        )
    if metric.endswith("loss") and arguments.greater_is_better:
        arguments = copy.copy(arguments)
        arguments.greater_is_better = False
    return arguments


def restart_bars(callbacks: Iterable[TrainerCallback]) -> None:
    """Let progress bars of an evaluation, which are as long as the data set, begin again for the next shape."""
    for callback in callbacks:
        bar: Any = getattr(callback, "prediction_bar", None)
        if isinstance(callback, ProgressCallback) and bar is not None:
            bar.reset()
