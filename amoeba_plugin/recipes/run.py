"""A recipe from its name to a checkpoint: every check first, then llm-compressor with the same data for every step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.extraction.checkpoint import how_to_load
from amoeba_plugin.extraction.model_card import RECIPE_NAME, require_model_card
from amoeba_plugin.modifiers.saving import plain_recipe, saved_in
from amoeba_plugin.recipes.budgeted import prepare_budget
from amoeba_plugin.recipes.execute import execute
from amoeba_plugin.recipes.inputs import RunOptions, calibration_batches
from amoeba_plugin.recipes.notes import notes
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.recipes.run_record import other_inputs, run_record, write_run_record
from amoeba_plugin.runtime.dtypes import computing_dtype, dtype_of, saved_dtype, store_in
from amoeba_plugin.runtime.files import whole_or_nothing
from amoeba_plugin.runtime.generation_defaults import require_generation_defaults
from amoeba_plugin.runtime.model_files import load_config
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.whole_weights import require_weights

logger = logging.getLogger(__name__)
NAMED = {  # what a recipe writes beside its checkpoint, by field
    "elastic_dir": "all shapes are in {0}; to cut another one: amoeba extract {0} --shape SHAPE -o DIRECTORY",
    "checkpoint_dir": "the training's own checkpoints are in {0}; they can be deleted",
    "tuned_dir": "what was tuned, with its exits and their votes, is in {0}: VotingModel.from_pretrained",
    "resume_dir": "what the selection found is in {0}; the same selection goes on from it, and else it can be deleted",
}


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        directory: The checkpoint.
        is_new: False: the same command had run before, and nothing was computed.
        plan: The recipe's.
    """

    directory: Path
    is_new: bool
    plan: RecipePlan

    @property
    def in_words(self) -> list[str]:
        """What there is now and what to do with it, in sentences; the first one says where the result is."""
        megabytes = sum(path.stat().st_size for path in self.directory.glob("*.safetensors")) / 1e6
        told = [
            f"checkpoint written to {self.directory}: {megabytes:,.1f} MB of weights; its README.md says what was done"
        ]
        if not self.is_new:
            told = [f"the result of this very run is in {self.directory} already; nothing was computed"]
        if self.plan.extraction is not None:
            told += how_to_load(self.directory, self.plan.extraction.portable)
        named = [NAMED[field].format(directory) for _, field, directory in self.plan.named_directories]
        return [*told, *dict.fromkeys(named)]  # two modifiers may share a directory


def run_recipe(
    recipe: str, model: str, dataset: str | None, output_dir: Path, options: RunOptions | None = None
) -> RunResult:
    """Run a recipe and write the checkpoint; what can be refused is refused before the model loads.

    Args:
        recipe: Path of a recipe file, or the name of a shipped one.
        model: Path or hub id of a causal LM.
        dataset: Path or hub id of calibration text; may be ``None`` for recipes that measure nothing.
        output_dir: New or empty; holds the whole checkpoint afterwards, or nothing after an error. Where it holds the
            result of the very same run, that is all there is to do.
        options: How the model is loaded, and calibration data drawn.

    Raises:
        AmoebaError: Recipe, model, data and directory do not fit together; the message says which and what to do.
    """
    options = options or RunOptions()
    plan = plan_recipe(recipe)
    record = run_record(plan, model, dataset, options)
    differences = other_inputs(output_dir, record)
    written = (output_dir, *(directory for _, _, directory in plan.named_directories))
    if differences == []:
        with owning(*written):  # clears the locks of a run that was killed after all else
            return RunResult(output_dir, is_new=False, plan=plan)
    if differences:
        raise ArtifactError(
            f"{output_dir} holds the result of another run (another {', another '.join(differences)}), and nothing is "
            "overwritten; name another --output-dir, or empty this one"
        )
    plan.require_runnable(output_dir)
    with owning(*written):
        plan.require_runnable(output_dir)  # another run may have ended meanwhile
        model_plan = plan.against(load_config(model))
        require_generation_defaults(model)
        require_weights(model, model_plan.config)
        vocab_size = model_plan.config.get_text_config().vocab_size
        batches = calibration_batches(plan, model, vocab_size, dataset, options)
        for note in notes(plan, model_plan):
            logger.warning(note)
        prepare_budget(plan, model_plan, model)
        with whole_or_nothing(output_dir) as partial:
            with _stored(partial, options.dtype, dtype_of(model_plan.config)) as dtype:
                execute(plan, model_plan, model, batches, partial, output_dir, replace(options, dtype=dtype))
            plain_recipe(partial / RECIPE_NAME)
            # after a stage of its own, or where there is no subnet, the save wrote no card
            require_model_card(partial, plan.card or {"base model": model})
            write_run_record(partial, record)
    return RunResult(output_dir, is_new=True, plan=plan)


@contextmanager
def _stored(directory: Path, asked: str, stored: torch.dtype | None) -> Iterator[str]:
    """Yield the dtype that a run computes in, and let it write its checkpoint in the base model's.

    Args:
        directory: Where the checkpoint goes.
        asked: "auto", or the dtype to compute in.
        stored: The base model's; ``None`` where its configuration names none.
    """
    dtype = asked
    if asked == "auto":
        dtype, why = computing_dtype(stored)
        logger.info(why)
    if dtype == "auto":  # the base names none
        yield dtype
        return
    computed: torch.dtype = getattr(torch, dtype)
    saved = saved_dtype(computed, stored)
    with saved_in(saved):
        yield dtype
    if saved != computed:
        store_in(directory, saved, computed)
