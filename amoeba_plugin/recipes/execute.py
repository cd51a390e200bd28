"""A plan carried out by llm-compressor's ``oneshot``; where that exchanges modules, structure changes before it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import llmcompressor
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE
from amoeba_plugin.extraction.model_card import RECIPE_NAME
from amoeba_plugin.modifiers.own_stage import run_own_stage
from amoeba_plugin.modifiers.quantized_experts import save_experts_by_original_names
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.model_plan import ModelPlan
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.runtime.model_files import copy_tokenizer


def execute(
    plan: RecipePlan,
    model_plan: ModelPlan,
    model: str,
    batches: list[Batch] | None,
    output_dir: Path,
    final_dir: Path,
    options: RunOptions,
) -> None:
    """Run the modifiers of a recipe and save what comes out.

    Args:
        plan: Of the recipe.
        model_plan: The same, against the model's configuration.
        model: Path or hub id.
        batches: Calibration data, where there is any.
        output_dir: Where the checkpoint goes; empty.
        final_dir: Where it will be.
        options: How the model is loaded.
    """
    set_seed(options.seed)
    _quantized(plan, model_plan, model, batches, output_dir, options)
    tuning = plan.tuned_behind
    if tuning is not None:
        assert batches is not None  # see RecipePlan.needs_data
        tuning.tune_checkpoint(output_dir, final_dir, batches)
        recorded = Recipe.from_modifiers(list(plan.modifiers))
        recorded.yaml(str(output_dir / RECIPE_NAME))


def _quantized(
    plan: RecipePlan,
    model_plan: ModelPlan,
    model: str,
    batches: list[Batch] | None,
    output_dir: Path,
    options: RunOptions,
) -> None:
    recipe: str | list[Modifier] = plan.source
    own_code = False
    with TemporaryDirectory(dir=output_dir) as scratch:  # a killed run leaves it where the next one clears up
        if plan.tuned_behind is not None:
            recipe = list(plan.in_session)
        if model_plan.needs_own_stage and batches is not None:
            stage = Path(scratch) if plan.rest else output_dir
            whole = AutoModelForCausalLM.from_pretrained(model, dtype=options.dtype).eval()
            run_own_stage(whole, plan.structural, batches, stage)
            copy_tokenizer(model, stage)
            if not plan.rest:
                return
            model, recipe, own_code = str(stage), list(plan.rest), (stage / PER_LAYER_FILE).is_file()
        llmcompressor.oneshot(
            model=_with_named_experts(model, options, own_code) if model_plan.has_experts else model,
            precision=options.dtype,
            recipe=recipe,
            dataset=None if batches is None else DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
            output_dir=str(output_dir),
            trust_remote_code_model=own_code,
        )


def _with_named_experts(model: str, options: RunOptions, own_code: bool) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, dtype=options.dtype, trust_remote_code=own_code
    )
    save_experts_by_original_names(loaded)
    return loaded
