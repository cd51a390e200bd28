"""How a recipe's layer tuning would fit this machine: measured on a few steps, nothing trained, nothing written."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.models.compressed_linear import keep_packed
from amoeba_plugin.recipes.inputs import RunOptions, calibration_batches
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.runtime.dtypes import computing_dtype, dtype_of
from amoeba_plugin.runtime.model_files import load_config
from amoeba_plugin.runtime.whole_weights import require_weights
from amoeba_plugin.training.layer_tuning.probing import Planned


def plan_tuning(
    recipe: str, model: str, dataset: str, options: RunOptions, memory: str | None, deadline: str | None
) -> Planned:
    """Plan the layer tuning of a recipe on a model, as it is given: what stands before it in the recipe does not run.

    Args:
        recipe: Path of a recipe file, or the name of a shipped one.
        model: Path or hub id: the model that would be tuned, perhaps quantized already.
        dataset: Training text, where the recipe names none.
        options: How text is drawn, and the dtype to compute in.
        memory: The most that the process may take, "2GiB"; ``None``: what the recipe says.
        deadline: The most time, "20min"; ``None``: what the recipe says.

    Raises:
        BudgetError: If no plan keeps the limits.
        RecipeError: If the recipe tunes no layers.
    """
    plan = plan_recipe(recipe)
    tuning = plan.tuning
    if tuning is None:
        raise RecipeError(f"{plan.source} has no AdaptiveLayerTuningModifier, whose training is planned here; add one")
    config = load_config(model)
    plan.asking(tuning, tuning.require_fits, config)
    require_weights(model, config)
    batches = calibration_batches(plan, model, config.vocab_size, dataset, options) or []
    dtype = computing_dtype(dtype_of(config))[0] if options.dtype == "auto" else options.dtype
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    keep_packed(loaded)
    return tuning.planned(loaded, batches, memory, deadline)
