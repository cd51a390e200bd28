"""What the modifiers of one recipe hand to one another: batches, strategies, the elastic model, the adapter.

Kept beside the model, not on it: a model that the host saves or copies carries nothing of ours.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import Repairs
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import ArchitectureError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter, require_usable
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.finite import require_finite_weights
from amoeba_plugin.models.packed_linear import is_packed
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.modifiers.own_stage import require_own_modules
from amoeba_plugin.runtime.generation_defaults import keep_generation_defaults
from amoeba_plugin.runtime.module_calls import input_device, is_offloaded
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.ranks import rank
from amoeba_plugin.selection.kept_steps import NOWHERE, KeptSteps, depth_digest, width_digest
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import repair_named
from amoeba_plugin.selection.repair.depth import fold_depths
from amoeba_plugin.selection.repair.width import repair_shapes
from amoeba_plugin.shape import SubnetShape

logger = logging.getLogger(__name__)
NO_REPAIR = "none"
DIRECTORY_FIELDS = ("resume_dir", "checkpoint_dir", "elastic_dir", "tuned_dir")  # of modifiers: what they write


@dataclass
class Selection:
    """The state of one recipe on one model."""

    session: weakref.ref[State]  # that runs the recipe
    adapter: ArchitectureAdapter
    fingerprint: str
    batches: list[Batch]
    owned: ExitStack = field(repr=False)  # directories that the recipe writes, until it is over
    depth: DepthStrategy | None = None
    width: WidthStrategy | None = None
    depth_repair: bool = False
    width_repair: str = NO_REPAIR
    repair_asked: bool = False  # in so many words: it is refused where it is impossible, and else left out
    kept: KeptSteps = NOWHERE  # what of the selection is done already
    totals: Mapping[Fraction, SubnetShape] = field(default_factory=dict)  # shapes by their share of the whole model
    elastic: ElasticModel | None = None
    on_elastic: list[Callable[[ElasticModel], None]] = field(default_factory=list)  # called once it is made
    peft_model: PeftModel | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note in the provenance how many seconds a step took."""
        started = time.perf_counter()
        yield
        self.provenance.setdefault("seconds", {})[what] = time.perf_counter() - started

    def require_elastic(self, model: PreTrainedModel) -> ElasticModel:
        """Return the elastic model, made when it is first asked for: selection is over then."""
        if self.elastic is None:
            depth = self.depth or DepthStrategy.whole(len(self.adapter.layers(model)))
            width = self.width or WidthStrategy.whole()
            repairs = self._repairs(model, depth, width)
            strategy = SubnetStrategy(depth, width, self.fingerprint, self.provenance, repairs)
            self.elastic = ElasticModel(model, strategy)
            for each in self.on_elastic:
                each(self.elastic)
        return self.elastic

    def _repairs(self, model: PreTrainedModel, depth: DepthStrategy, width: WidthStrategy) -> Repairs:
        """Repair what was selected: depth and width are both known by now."""
        depths = self.depth_repair and len(depth.kept) > 1
        widths = self.width_repair != NO_REPAIR and len(width.units) > 1
        if not (depths or widths):
            return Repairs()
        with on_main_device(model), self.timed("repair"):
            try:
                runs = LayerRuns.of(model, self.adapter, self.batches)
            except ArchitectureError as error:
                if self.repair_asked:
                    raise ArchitectureError(f"repair is impossible: {error}; set repair: none") from error
                logger.warning("nothing is repaired: %s", error)
                return Repairs()
            kept = self.kept.also(
                depth=depth_digest(depth), depth_repair=str(depths), width=width_digest(width), repair=self.width_repair
            )
            folds = fold_depths(runs, depth, kept=kept) if depths else {}
            repair = repair_named(self.width_repair) if widths else None
            found = repair_shapes(runs, width, repair, folds, kept=kept)
        if found:
            logger.info("repaired by %s: %.1f MB of weights beside the shared ones", found.method, found.bytes / 1e6)
        return found


_SELECTIONS: weakref.WeakKeyDictionary[PreTrainedModel, Selection] = weakref.WeakKeyDictionary()


def selection_for(state: State) -> Selection:
    """Return the selection of the model that a session works on.

    Calibration batches are drawn once: every iteration of the host's loader is another order and another subset. What
    an earlier session left of a recipe that it did not finish is dropped, and its model whole again.

    Raises:
        ArchitectureError: If the model is quantized in a form that cannot be used here, or its architecture is not
            supported.
        ArtifactError: If one of its weights is NaN or infinite.
        RecipeError: If ``oneshot`` would fail on the packed weights that the recipe leaves it.
        DataError: If there is no calibration data.
    """
    model = state.model
    known = _SELECTIONS.get(model)
    if known is not None and known.session() is not state:
        forget_selection(model)
        if known.elastic is not None:
            known.elastic.release()
    if model not in _SELECTIONS:
        require_usable(model)
        require_own_modules(model)
        _require_extraction(state)
        require_finite_weights(model)
        keep_generation_defaults(model)
        adapter = architecture_of(model.config)
        batches = materialise(state.data.calib, vocab_size=model.config.vocab_size)
        fingerprint = model_fingerprint(model, adapter)
        _SELECTIONS[model] = Selection(weakref.ref(state), adapter, fingerprint, batches, _owned_by_session(model))
    return _SELECTIONS[model]


def _require_extraction(state: State) -> None:
    """Refuse what would fail after hours of training: ``oneshot`` moves all weights when a recipe is over."""
    modifiers = active_session().lifecycle.recipe.modifiers
    trained_elsewhere = state.data.train is not None or state.optimizer is not None
    if (
        not modifiers
        or trained_elsewhere
        or any(type(each).__name__ == "SubnetExtractionModifier" for each in modifiers)
    ):
        return
    packed = next((path for path, module in state.model.named_modules() if is_packed(module)), None)
    if packed is not None:
        raise RecipeError(
            f"{packed} keeps its weight packed, which llm-compressor cannot move when the recipe is over; end the "
            "recipe with SubnetExtractionModifier, whose subnet is dense, or train with OneForAllTrainer or "
            "begin_session"
        )


def named_directories(modifier: Modifier) -> dict[str, Path]:
    """Return the directories that a modifier writes, by the field that names them."""
    named = {name: getattr(modifier, name, None) for name in DIRECTORY_FIELDS}
    return {name: Path(directory) for name, directory in named.items() if directory is not None}


def _owned_by_session(model: PreTrainedModel) -> ExitStack:
    """Own what the session's recipe will write, before anything is computed."""
    owned = ExitStack()
    if rank() == 0:
        for modifier in active_session().lifecycle.recipe.modifiers:
            owned.enter_context(owning(*named_directories(modifier).values()))
        weakref.finalize(model, owned.close)  # of a session that never ends
    return owned


def forget_selection(model: PreTrainedModel) -> Selection | None:
    """Drop and return what was kept for a model; the recipe is over or the model is something else now."""
    selection = _SELECTIONS.pop(model, None)
    if selection is not None:
        selection.owned.close()
    return selection


@contextmanager
def on_main_device(model: PreTrainedModel) -> Iterator[torch.device]:
    """Run a block with the model on the accelerator where there is one; it goes back to where it was.

    A model that accelerate has dispatched stays where its parts are.
    """
    if hasattr(model, "hf_device_map") or is_offloaded(model):
        yield input_device(model)
        return
    before = model.device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator if accelerator is not None and before.type == "cpu" else before
    nn.Module.to(model, device)
    try:
        yield device
    finally:
        nn.Module.to(model, before)
