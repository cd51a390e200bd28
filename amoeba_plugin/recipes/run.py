"""Run a recipe on a model: every check first, then llm-compressor's ``oneshot`` with the same data for every step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE, weightless
from amoeba_plugin.errors import DataError
from amoeba_plugin.recipes.check import CheckedRecipe, check_recipe
from amoeba_plugin.recipes.files import find_recipe
from amoeba_plugin.recipes.preflight import check_against_model, has_experts, require_elastic_dir, require_new_directory
from amoeba_plugin.runtime.files import whole_or_nothing
from amoeba_plugin.runtime.model_files import load_config, load_tokenizer, require_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amoeba_plugin.data.batch import Batch


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
        dtype: That the model is loaded in: "auto" (its own), "float32", "bfloat16", "float16".
    """

    split: str = "train"
    text_column: str | None = None
    num_samples: int = 512
    max_seq_length: int = 512
    batch_size: int = 1
    seed: int = 42
    dtype: str = "auto"


def run_recipe(
    recipe: str,
    model: str,
    dataset: str | None,
    output_dir: Path,
    options: RunOptions | None = None,
) -> Path:
    """Run a recipe and write the checkpoint; what can be refused is refused before the model loads.

    Args:
        recipe: Path of a recipe file, or the name of a shipped one.
        model: Path or hub id of a causal LM.
        dataset: Path or hub id of calibration text; may be ``None`` for recipes that measure nothing.
        output_dir: New or empty; holds the whole checkpoint afterwards, or nothing after an error.
        options: How calibration data is drawn.

    Returns:
        ``output_dir``.

    Raises:
        AmoebaError: Recipe, model, data and directory do not fit together; the message says which and what to do.
    """
    from amoeba_plugin.modifiers.smoothing import require_accelerator

    options = options or RunOptions()
    checked = check_recipe(find_recipe(recipe))
    require_accelerator(checked.modifiers, checked.source)
    require_new_directory(output_dir)
    require_elastic_dir(checked, output_dir)
    check_against_model(checked, load_config(model))
    require_weights(model)
    batches = calibration_batches(checked, model, dataset, options)
    with whole_or_nothing(output_dir) as partial:
        _oneshot(checked, model, batches, partial, options)
        _require_card(checked, model, partial)
    return output_dir


def calibration_batches(
    recipe: CheckedRecipe, model: str, dataset: str | None, options: RunOptions
) -> list[Batch] | None:
    """Tokenise calibration data and check that the recipe's objective can be measured on it.

    Raises:
        DataError: If the recipe needs data and there is none, or it lacks what the objective needs.
    """
    if dataset is None:
        if recipe.needs_data:
            raise DataError(
                f"{recipe.source} measures the model on text, and there is no calibration data; give --dataset"
            )
        return None
    from amoeba_plugin.data.text import load_batches
    from amoeba_plugin.modifiers import DepthShrinkingModifier
    from amoeba_plugin.selection.registry import objective_named

    _require_own_data(recipe)
    batches = load_batches(
        dataset,
        load_tokenizer(model),
        split=options.split,
        text_column=options.text_column,
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    depth = recipe.find(DepthShrinkingModifier)
    if depth is not None and depth.kept_layers is None and depth.questions is None:
        objective_named(depth.objective).check(batches)
    return batches


def _require_own_data(recipe: CheckedRecipe) -> None:
    """Open what modifiers read after selection has taken its hours."""
    from amoeba_plugin.data.text import read_text, require_file
    from amoeba_plugin.modifiers import DepthShrinkingModifier, OneForAllDistillationModifier

    depth, training = recipe.find(DepthShrinkingModifier), recipe.find(OneForAllDistillationModifier)
    if depth is not None and depth.questions is not None:
        require_file(depth.questions.dataset)  # read first thing
    if training is not None and training.dataset is not None and training.max_steps:
        read_text(training.dataset, training.dataset_split, training.text_column)


def _oneshot(
    recipe: CheckedRecipe, model: str, batches: list[Batch] | None, output_dir: Path, options: RunOptions
) -> None:
    from transformers import set_seed

    from amoeba_plugin.modifiers.own_stage import needs_own_stage

    set_seed(options.seed)
    if batches is None or not recipe.structural or not needs_own_stage(weightless(load_config(model))):
        _host(model, recipe.source, batches, output_dir, options)
        return
    rest = [modifier for modifier in recipe.modifiers if modifier not in recipe.structural]
    if not rest:
        _own_stage(recipe, model, batches, output_dir, options)
        return
    with TemporaryDirectory(dir=output_dir) as subnet:  # a killed run leaves it where the next one clears up
        _own_stage(recipe, model, batches, Path(subnet), options)
        _host(subnet, rest, batches, output_dir, options, own_code=(Path(subnet) / PER_LAYER_FILE).is_file())


def _require_card(recipe: CheckedRecipe, model: str, directory: Path) -> None:
    """Write the model card where the save did not: after a stage of its own, or where there is no subnet."""
    from amoeba_plugin.extraction.model_card import CARD_NAME, write_model_card
    from amoeba_plugin.modifiers import SubnetExtractionModifier

    extraction = recipe.find(SubnetExtractionModifier)
    if extraction is not None and extraction.card:  # these modifiers ran themselves; oneshot parses the recipe anew
        write_model_card(directory, extraction.card)
    elif not (directory / CARD_NAME).exists():
        write_model_card(directory, {"base model": model})


def _host(
    model: str,
    recipe: str | list[Any],
    batches: list[Batch] | None,
    output_dir: Path,
    options: RunOptions,
    own_code: bool = False,
) -> None:
    import llmcompressor
    from torch.utils.data import DataLoader

    loader: DataLoader[Batch] | None = None
    if batches is not None:
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    loaded = _with_named_experts(model, options, own_code) if has_experts(load_config(model)) else model
    llmcompressor.oneshot(
        model=loaded,
        precision=options.dtype,
        recipe=recipe,
        dataset=loader,
        output_dir=str(output_dir),
        trust_remote_code_model=own_code,
    )


def _with_named_experts(model: str, options: RunOptions, own_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from amoeba_plugin.modifiers.quantized_experts import save_experts_by_original_names

    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, dtype=options.dtype, trust_remote_code=own_code
    )
    save_experts_by_original_names(loaded)
    return loaded


def _own_stage(recipe: CheckedRecipe, model: str, batches: list[Batch], directory: Path, options: RunOptions) -> None:
    from transformers import AutoModelForCausalLM

    from amoeba_plugin.modifiers.own_stage import run_own_stage
    from amoeba_plugin.runtime.model_files import copy_tokenizer

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=options.dtype).eval()
    run_own_stage(whole, recipe.structural, batches, directory)
    copy_tokenizer(model, directory)
