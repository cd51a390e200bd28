"""Models whose norms llm-compressor exchanges while a recipe runs, and the way round it.

Gemma's norms multiply by ``1 + weight``. Before any modifier acts, ``oneshot`` replaces each by one that multiplies by
its weight, and puts the originals back afterwards, by the names they had in the whole model. In between, a subnet would
be built of the wrong norms; afterwards its layers have other names. So nothing structural can happen inside
``oneshot``: it happens before, in a session of its own, and ``oneshot`` sees an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressed_tensors.registry import standardize_lookup_name
from llmcompressor.core import create_session
from llmcompressor.modeling.offset_norm import NormCalibrationModule
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.calibration import Batch
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.modifiers.saving import RECIPE_NAME, plain_recipe


def has_offset_norms(model: nn.Module) -> bool:
    """Tell whether ``oneshot`` would exchange a model's norms; weights are not looked at."""
    known = {*NormCalibrationModule.registered_names(), *NormCalibrationModule.registered_aliases()}
    return any(standardize_lookup_name(type(module).__name__) in known for module in model.modules())


def require_own_norms(model: nn.Module) -> None:
    """Refuse a model whose norms the host has exchanged.

    Raises:
        ArchitectureError: With the way round.
    """
    if any(isinstance(module, NormCalibrationModule) for module in model.modules()):
        raise ArchitectureError(
            f"{type(model).__name__} inside llmcompressor.oneshot: it exchanges the norms of this architecture before "
            "a recipe runs and puts them back by their names in the whole model, which a subnet does not have. Run the "
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
