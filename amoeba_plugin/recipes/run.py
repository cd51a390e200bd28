"""A recipe from its name to a checkpoint: every check first, then llm-compressor with the same data for every step."""

from __future__ import annotations

from pathlib import Path

from amoeba_plugin.extraction.model_card import require_model_card
from amoeba_plugin.recipes.execute import execute
from amoeba_plugin.recipes.inputs import RunOptions, calibration_batches
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.runtime.files import whole_or_nothing
from amoeba_plugin.runtime.model_files import load_config
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.whole_weights import require_weights


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
    plan.require_runnable(output_dir)
    with owning(output_dir, *(directory for _, _, directory in plan.named_directories)):
        plan.require_runnable(output_dir)  # another run may have ended meanwhile
        model_plan = plan.against(load_config(model))
        require_weights(model, model_plan.config)
        batches = calibration_batches(plan, model, dataset, options)
        with whole_or_nothing(output_dir) as partial:
            execute(plan, model_plan, model, batches, partial, options)
            # after a stage of its own, or where there is no subnet, the save wrote no card
            require_model_card(partial, plan.card or {"base model": model})
    return output_dir
