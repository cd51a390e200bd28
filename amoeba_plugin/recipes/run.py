"""Run a recipe on a model: every check first, then llm-compressor's ``oneshot`` with the same data for every step."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import llmcompressor
from llmcompressor.modifiers import Modifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE
from amoeba_plugin.extraction.model_card import CARD_NAME, write_model_card
from amoeba_plugin.modifiers.own_stage import run_own_stage
from amoeba_plugin.modifiers.quantized_experts import save_experts_by_original_names
from amoeba_plugin.modifiers.smoothing import require_accelerator
from amoeba_plugin.recipes.inputs import RunOptions, calibration_batches
from amoeba_plugin.recipes.model_plan import ModelPlan
from amoeba_plugin.recipes.places import require_apart, require_new_directory
from amoeba_plugin.recipes.plan import RecipePlan, plan_recipe
from amoeba_plugin.runtime.files import whole_or_nothing
from amoeba_plugin.runtime.model_files import copy_tokenizer, load_config, require_weights


def run_recipe(
    recipe: str, model: str, dataset: str | None, output_dir: Path, options: RunOptions | None = None
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
    options = options or RunOptions()
    plan = plan_recipe(recipe)
    _require_places(plan, output_dir)
    model_plan = plan.against(load_config(model))
    require_weights(model)
    batches = calibration_batches(plan, model, dataset, options)
    with whole_or_nothing(output_dir) as partial:
        _execute(plan, model_plan, model, batches, partial, options)
        _require_card(plan, model, partial)
    return output_dir


def _require_places(plan: RecipePlan, output_dir: Path) -> None:
    for modifier in plan.modifiers:
        with plan.blaming(modifier):
            require_accelerator(modifier)
    require_new_directory(output_dir)
    for modifier, field in (
        (plan.depth, "resume_dir"), (plan.training, "checkpoint_dir"), (plan.training, "elastic_dir"),
    ):  # fmt: skip
        directory = getattr(modifier, field, None)
        if directory is not None:
            with plan.blaming(modifier):
                require_apart(field, Path(directory), output_dir)


def _execute(
    plan: RecipePlan,
    model_plan: ModelPlan,
    model: str,
    batches: list[Batch] | None,
    output_dir: Path,
    options: RunOptions,
) -> None:
    set_seed(options.seed)
    experts = model_plan.has_experts
    if batches is None or not model_plan.needs_own_stage:
        loaded = _loaded(model, options, own_code=False) if experts else model
        _oneshot(loaded, plan.source, batches, output_dir, options)
    elif not plan.rest:
        _own_stage(plan, model, batches, output_dir, options)
    else:
        with TemporaryDirectory(dir=output_dir) as subnet:  # a killed run leaves it where the next one clears up
            _own_stage(plan, model, batches, Path(subnet), options)
            own_code = (Path(subnet) / PER_LAYER_FILE).is_file()
            loaded = _loaded(subnet, options, own_code) if experts else subnet
            _oneshot(loaded, list(plan.rest), batches, output_dir, options, own_code)


def _oneshot(
    model: str | PreTrainedModel,
    recipe: str | list[Modifier],
    batches: list[Batch] | None,
    output_dir: Path,
    options: RunOptions,
    own_code: bool = False,
) -> None:
    loader: DataLoader[Batch] | None = None
    if batches is not None:
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    llmcompressor.oneshot(
        model=model,
        precision=options.dtype,
        recipe=recipe,
        dataset=loader,
        output_dir=str(output_dir),
        trust_remote_code_model=own_code,
    )


def _loaded(model: str, options: RunOptions, own_code: bool) -> PreTrainedModel:
    """Load a mixture of experts here, so that its experts are saved under the names that transformers reads."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, dtype=options.dtype, trust_remote_code=own_code
    )
    save_experts_by_original_names(loaded)
    return loaded


def _own_stage(plan: RecipePlan, model: str, batches: list[Batch], directory: Path, options: RunOptions) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=options.dtype).eval()
    run_own_stage(whole, plan.structural, batches, directory)
    copy_tokenizer(model, directory)


def _require_card(plan: RecipePlan, model: str, directory: Path) -> None:
    """Write the model card where the save did not: after a stage of its own, or where there is no subnet."""
    if plan.extraction is not None and plan.extraction.card:  # ran itself; oneshot parses the recipe anew
        write_model_card(directory, plan.extraction.card)
    elif not (directory / CARD_NAME).exists():
        write_model_card(directory, {"base model": model})
