"""What a run reads beside its recipe: options, and calibration data, which is opened before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.text import load_batches, read_text, require_file
from amoeba_plugin.errors import DataError
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.selection.registry import objective_named


@dataclass(frozen=True)
class RunOptions:
    """How the model is loaded, and how calibration data is drawn from a data set.

    Attributes:
        split: Split of the data set.
        text_column: Column with the text; ``None`` for the only text column, or for data that is tokenised already.
        num_samples: Sequences.
        max_seq_length: Tokens per sequence.
        batch_size: Sequences per batch.
        seed: Of the draw, and of everything random that follows.
        dtype: To compute in: "float32", "bfloat16", "float16", or "auto": the model's own where the machine has
            instructions for it, else float32. The checkpoint is saved in the model's own all the same.
    """

    split: str = "train"
    text_column: str | None = None
    num_samples: int = 512
    max_seq_length: int = 512
    batch_size: int = 1
    seed: int = 42
    dtype: str = "auto"


def calibration_batches(
    plan: RecipePlan, model: str, vocab_size: int, dataset: str | None, options: RunOptions
) -> list[Batch] | None:
    """Tokenise calibration data and check that the recipe's objective can be measured on it.

    Args:
        plan: Of the recipe.
        model: Path or hub id.
        vocab_size: Tokens of the model.
        dataset: Path or hub id of the data, if any.
        options: How it is drawn.

    Raises:
        DataError: If the recipe needs data and there is none, it is not of the model's tokens, or it lacks what the
            objective needs.
    """
    if dataset is None:
        if plan.needs_data:
            raise DataError(
                f"{plan.source} measures the model on text, and there is no calibration data; give --dataset"
            )
        return None
    _require_own_data(plan, model, vocab_size)
    batches = load_batches(
        dataset,
        load_tokenizer(model),
        split=options.split,
        text_column=options.text_column,
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
        batch_size=options.batch_size,
        vocab_size=vocab_size,
        seed=options.seed,
    )
    depth = plan.depth
    if depth is not None and depth.kept_layers is None and depth.questions is None:
        objective_named(depth.objective).check(batches)
    return batches


def _require_own_data(plan: RecipePlan, model: str, vocab_size: int) -> None:
    """Open what modifiers read after selection has taken its hours."""
    depth, training = plan.depth, plan.training
    if depth is not None and depth.questions is not None:
        require_file(depth.questions.dataset)  # read first thing
    if training is not None and training.dataset is not None and training.max_steps:
        _, text_column = read_text(training.dataset, training.dataset_split, training.text_column)
        if text_column is None:  # text will be of the tokens that the model's own tokenizer has
            training.read_dataset(model, vocab_size)
