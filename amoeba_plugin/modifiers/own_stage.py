"""Models whose modules llm-compressor exchanges before a recipe runs, and the way round it.

1. Gemma's norms multiply by ``1 + weight``. ``oneshot`` replaces each by one that multiplies by its weight, and puts
   the originals back afterwards, by the names they had in the whole model. In between, a subnet would be built of the
   wrong norms; afterwards its layers have other names.
2. Experts in three-dimensional parameters are replaced by linears, expert by expert, and stay so; a stock class could
   not be filled from them.

So nothing structural can happen inside ``oneshot`` with these: it happens before, in a session of its own, and
``oneshot`` sees an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressed_tensors.registry import standardize_lookup_name
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modeling.offset_norm import NormCalibrationModule
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.model_card import RECIPE_NAME
from amoeba_plugin.modifiers.saving import plain_recipe


def needs_own_stage(model: nn.Module) -> bool:
    """Tell whether ``oneshot`` would exchange modules of a model; weights are not looked at."""
    known = {*NormCalibrationModule.registered_names(), *NormCalibrationModule.registered_aliases()}
    norms = any(standardize_lookup_name(type(module).__name__) in known for module in model.modules())
    return norms or bool(get_non_linearized_moes(model))


def require_own_modules(model: nn.Module) -> None:
    """Refuse a model whose modules the host has exchanged.

    Raises:
        ArchitectureError: With the way round.
    """
    exchanged = {
        type(module).__name__
        for module in model.modules()
        if isinstance(module, NormCalibrationModule | LinearExperts2D)
    }
    if exchanged:
        raise ArchitectureError(
            f"{type(model).__name__} inside llmcompressor.oneshot, which has exchanged modules of this architecture "
            f"({', '.join(sorted(exchanged))}) before the recipe runs, so that no subnet can be made of them. Run the "
            "same recipe with `amoeba run`: it selects, trains and extracts in a stage of its own, before oneshot"
        )


def run_own_stage(model: PreTrainedModel, modifiers: Sequence[Modifier], batches: list[Batch], directory: Path) -> None:
    """Run structural modifiers on a model outside ``oneshot`` and write what comes out, with its recipe beside it.

    Args:
        model: Changed in place.
        modifiers: Ours only, in their order.
        batches: Calibration data.
        directory: Where the checkpoint goes; made if missing. ``oneshot`` on it appends to the recipe.
    """
    with create_session() as session:
        session.initialize(
            recipe=Recipe.from_modifiers(list(modifiers)), model=model, calib_data=batches, copy_data=False
        )
        session.finalize()
        session.state.model.save_pretrained(directory)
        session.lifecycle.recipe.yaml(str(directory / RECIPE_NAME))
    plain_recipe(directory / RECIPE_NAME)
