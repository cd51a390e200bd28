"""WidthShrinkingModifier: importance of KV groups and MLP neurons, as a recipe step."""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.sharing import shard
from amoeba_plugin.elastic.strategy import WidthStrategy
from amoeba_plugin.errors import ArchitectureError, PluginError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.fingerprint import model_identity
from amoeba_plugin.modifiers.order import require_session_order
from amoeba_plugin.modifiers.selection import NO_REPAIR, Selection, on_main_device, selection_for
from amoeba_plugin.runtime.module_calls import is_offloaded
from amoeba_plugin.selection.activation_stats import collect_statistics
from amoeba_plugin.selection.depth.layer_importance import most_sensitive_layers
from amoeba_plugin.selection.gradients import loss_gradients
from amoeba_plugin.selection.importance import GroupImportance, Importance, MomentImportance
from amoeba_plugin.selection.kept_steps import NOWHERE, KeptSteps, depth_digest
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.registry import importance_named, objective_named, repair_named
from amoeba_plugin.selection.repair.collect import collect_moments
from amoeba_plugin.selection.repair.fold_table import LEAST_JUDGING, FoldTable, parted
from amoeba_plugin.selection.repair.moments import ChannelMoments, held_out_count
from amoeba_plugin.selection.repair.width import WidthRepair
from amoeba_plugin.selection.width.kept_ranking import Ranking, kept_ranking
from amoeba_plugin.selection.width.measured import measured_widths
from amoeba_plugin.selection.width.ranking import coupled_parameters, rank_widths
from amoeba_plugin.selection.width.task import WidthTask
from amoeba_plugin.selection.width.trials import Trials
from amoeba_plugin.shape import parse_width

logger = logging.getLogger(__name__)
#: Fields that a ranking depends on.
RANKED_BY = (
    "widths", "totals", "importance", "allocation", "anchor_layers", "round_to", "repair", "bias_compensation",
)  # fmt: skip
JUDGING_SPLITS = 64  # rows that judge splits of a width, an eighth at least: on fewer, close ones change places
OF_REPAIRED, OF_CUT = "obs", "flap"  # importances, where nothing else is asked for
GIB, MOMENTS_GIB = 2**30, 4.0  # of moments in memory; the rest is files


class WidthShrinkingModifier(Modifier):
    """Rank the units of every layer and decide how many each width keeps (FLAP, arXiv:2312.11983).

    Sample YAML::

        WidthShrinkingModifier: {widths: ["1", "7/8", "3/4", "5/8"]}

    Attributes:
        widths: Shares of channels kept, exact fractions in (0, 1]; 1 must be among them. Default ``["1"]``.
        totals: Shares kept of the units of all layers, depth and width together. For each the best of the depths that
            ``DepthShrinkingModifier`` found, at the width that makes up the rest, is measured; that width joins
            ``widths``, and ``SubnetExtractionModifier: {total: 1/2}`` cuts the shape. With no widths beside them,
            subnets have the depths and widths of the totals alone. Default: none.
        importance: ``flap`` (weighted input fluctuation), ``obs`` (the error that is left when a unit goes and the
            others are repaired), ``flap_ifv``, ``flap_wifn``, ``wanda``, ``magnitude``, ``group_magnitude``, ``taylor``
            or ``taylor_vector`` (these two take a backward pass over the calibration data, and 4 bytes of main memory
            per weight), or a plugin's. Default ``obs``, and ``flap`` where widths are not repaired.
        allocation: ``measured``, the same sizes in every layer, split between attention and MLP as loses least on the
            calibration data; ``uniform``, the same share of attention and MLP in every layer; or ``global``, the
            paper's one threshold over all layers. Stock classes can load the first two, a per-layer class holds the
            last. Default ``measured``.
        anchor_layers: Layers that keep full width while the others make up for them, so that widths stay shares of the
            whole model: their indices, or how many of the most sensitive ones (those without which the calibration
            loss is worst; the recipe saved beside a checkpoint names them). Layers then differ in size. Default 0.
        round_to: Channels that kept sizes are multiples of, for all groups or per group (``attention``, ``mlp``).
            Default 1. W4A16 quantization with groups of 128 wants 128.
        repair: ``least_squares``: what missing channels said is predicted from those kept, by weights of its own for
            every width of the linears that read them, and MLPs make up for what narrow layers have lost so far;
            ``local_least_squares``: every linear for itself; ``none``; or a plugin's. Default ``least_squares``, with
            ``bias_compensation`` ``none``.
        bias_compensation: Add what missing channels contributed on average to the output bias. Default false.
        resume_dir: A directory that keeps the ranking, and every depth and every width that is repaired, so that a
            killed selection goes on behind the last of them. It takes the bytes of the repaired weights. Default
            ``None``.
    """

    widths: list[str] = Field(default_factory=lambda: ["1"])
    totals: list[str] = Field(default_factory=list)
    importance: str = OF_REPAIRED
    allocation: Literal["measured", "uniform", "global"] = "measured"
    anchor_layers: int | list[int] = 0
    round_to: int | dict[str, int] = Field(default=1)
    repair: str = "least_squares"
    bias_compensation: bool = False
    resume_dir: str | None = None

    @field_validator("widths", mode="before")
    @classmethod
    def _widths_parse(cls, widths: list[Any]) -> list[str]:
        if not isinstance(widths, list) or not widths:
            raise RecipeError(f'widths: {widths!r} is no list of shares; write ["1", "7/8", "3/4"]')
        parsed = {parse_width(width) for width in widths}
        if 1 not in parsed:
            raise RecipeError(
                f'widths {[str(width) for width in widths]} lack 1: the whole model teaches its subnets; add "1"'
            )
        return [str(width) for width in sorted(parsed, reverse=True)]

    @field_validator("totals", mode="before")
    @classmethod
    def _totals_parse(cls, totals: list[Any]) -> list[str]:
        if not isinstance(totals, list):
            raise RecipeError(f'totals: {totals!r} is no list of shares; write ["4/5", "1/2"]')
        return [str(total) for total in sorted({parse_width(total) for total in totals}, reverse=True)]

    @field_validator("importance")
    @classmethod
    def _importance_exists(cls, name: str) -> str:
        importance_named(name)
        return name

    @field_validator("repair", mode="before")
    @classmethod
    def _repair_exists(cls, name: Any) -> str:
        if name in (None, False, NO_REPAIR):
            return NO_REPAIR
        try:
            repair_named(str(name))
        except PluginError as error:
            raise PluginError(f"{error}, or {NO_REPAIR}") from error
        return str(name)

    @field_validator("anchor_layers")
    @classmethod
    def _anchors_are_counted(cls, anchors: int | list[int]) -> int | list[int]:
        if isinstance(anchors, int) and anchors < 0:
            raise RecipeError(f"anchor_layers {anchors} is impossible; give how many layers, or their indices")
        return anchors

    @model_validator(mode="after")
    def _repaired_or_compensated(self) -> WidthShrinkingModifier:
        if self.bias_compensation and "repair" not in self.model_fields_set:
            self.repair = NO_REPAIR
        if self.bias_compensation and self.repair != NO_REPAIR:
            raise RecipeError(
                f"repair: {self.repair} makes up for missing channels by weights, bias_compensation by biases, and "
                "together they would do it twice; set bias_compensation: false, or repair: none"
            )
        if self.repair == NO_REPAIR and "importance" not in self.model_fields_set:
            self.importance = OF_CUT
        return self

    @model_validator(mode="after")
    def _totals_are_measured(self) -> WidthShrinkingModifier:
        if self.totals and (self.allocation != "measured" or self.anchor_count):
            raise RecipeError(
                f"totals are measured over all layers, with allocation: {self.allocation} and {self.anchor_count} "
                "anchor_layers; leave totals out, or take allocation: measured without anchor_layers"
            )
        return self

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> WidthShrinkingModifier:
        if not self.totals and "widths" not in self.model_fields_set:
            raise RecipeError('WidthShrinkingModifier has no widths; write widths: ["1", "3/4"], or totals: ["1/2"]')
        return self

    @property
    def reduced(self) -> int:
        """How many widths below 1 there will be, at most."""
        return len(self.widths) - 1 + len(self.totals)

    @property
    def anchor_count(self) -> int:
        """How many layers keep full width."""
        return self.anchor_layers if isinstance(self.anchor_layers, int) else len(set(self.anchor_layers))

    def judging(self, rows: int) -> int:
        """Return how many rows of calibration data splits of a width are judged on."""
        return held_out_count(rows, LEAST_JUDGING if self.totals else JUDGING_SPLITS)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Collect statistics on the dense model and rank.

        Raises:
            ArchitectureError: If accelerate offloads weights of a model that sizes are to be tried on.
        """
        require_session_order(self)
        selection, model = selection_for(state), state.model
        with on_main_device(model), selection.timed("width ranking"):
            selection.kept = self._kept(model, selection)
            found = kept_ranking(selection.kept, partial(self._ranked, model, selection))
        self._take(found, selection)
        if self.allocation != "measured":  # which tells what it measured
            _tell(found.width)
        return True

    def _kept(self, model: PreTrainedModel, selection: Selection) -> KeptSteps:
        """Return what keeps the steps of the selection, by the fields as the recipe has them."""
        if self.resume_dir is None:
            return NOWHERE
        fields = {name: getattr(self, name) for name in RANKED_BY}
        identity = {
            "model": model_identity(model, selection.adapter),
            "dtype": str(model.dtype),
            "data": shard(selection.batches)[1],
            **{name: each if isinstance(each, str) else json.dumps(each, sort_keys=True)
               for name, each in fields.items()},
        }  # fmt: skip
        kept = KeptSteps(Path(self.resume_dir), identity)
        if not self.totals or selection.depth is None:
            return kept
        return kept.also(depth=depth_digest(selection.depth), depth_repair=str(selection.depth_repair))

    def _take(self, found: Ranking, selection: Selection) -> None:
        """Hand a ranking on; the recipe saved beside a checkpoint names what was found."""
        selection.width, selection.totals = found.width, found.totals
        self.repair = selection.width_repair = found.repair
        if self.anchor_layers:
            self.anchor_layers = list(found.anchors)
        if self.allocation == "measured":
            self.widths = [str(share) for share in found.width.units]
        if found.totals:
            totals = {str(total): str(shape) for total, shape in found.totals.items()}
            selection.provenance["totals"] = totals

    def _ranked(self, model: PreTrainedModel, selection: Selection) -> Ranking:
        adapter, batches = selection.adapter, selection.batches
        if self.allocation == "measured" and is_offloaded(model):
            raise ArchitectureError(
                "allocation: measured tries sizes on the model, and accelerate offloads its weights; set allocation: "
                "uniform or global, or load the model where memory holds it whole"
            )
        if isinstance(self.anchor_layers, int) and self.anchor_layers:
            self.anchor_layers = most_sensitive_layers(
                model, adapter, objective_named("loss"), batches, self.anchor_layers
            )
        with ChannelMoments.of(MOMENTS_GIB * GIB) as moments:
            runs = self._runs(model, adapter, batches)
            scored = isinstance(importance_named(self.importance), MomentImportance)
            if runs is not None and (scored or self.allocation == "measured"):  # whose splits are tried repaired
                collect_moments(runs, moments)
            task = self._task(model, adapter, batches, moments)
            if self.allocation != "measured":
                return Ranking(rank_widths(task), {}, tuple(task.anchors), self.repair)
            at_depths = bool(self.totals) and selection.depth is not None
            fitting, judging = parted(batches, LEAST_JUDGING if at_depths else JUDGING_SPLITS)
            trials = None if runs is None else self._trials(runs, moments, selection, fitting, judging)
            found, shapes = measured_widths(task, objective_named("loss"), judging or batches, trials=trials)
            return Ranking(found, shapes, tuple(task.anchors), self.repair)

    def _trials(
        self, runs: LayerRuns, moments: ChannelMoments, selection: Selection, fitting: list[Batch], judging: list[Batch]
    ) -> Trials:
        """Return what tries sizes, repaired, and judged on rows that repair no trial; for totals at all depths."""
        objective = objective_named("loss")
        repair = None if self.repair == NO_REPAIR else WidthRepair(repair_named(self.repair), moments, unseen=True)
        judged = runs if not judging else LayerRuns.of(runs.model, runs.adapter, judging)
        if not self.totals or selection.depth is None:
            return Trials(judged, objective, repair)
        whole = {depth: kept for depth, kept in selection.depth.kept.items() if depth not in selection.depth.lost}
        fit = runs if not judging else LayerRuns.of(runs.model, runs.adapter, fitting)
        with FoldTable.of(fit) as table:
            folds = {} if table is None or not selection.depth_repair else table.weights(selection.depth)
        return Trials(judged, objective, repair, whole, folds)

    def _runs(self, model: PreTrainedModel, adapter: ArchitectureAdapter, batches: list[Batch]) -> LayerRuns | None:
        """Return what runs the calibration data for second moments; ``None``: nothing needs them, or can have them."""
        unasked = "importance" not in self.model_fields_set
        scored = not unasked and isinstance(importance_named(self.importance), MomentImportance)
        if not scored and not self.totals and (self.repair == NO_REPAIR or len(self.widths) < 2):
            self.importance = OF_CUT if unasked else self.importance
            return None
        try:
            if is_offloaded(model):
                raise ArchitectureError("accelerate offloads weights of the model, which cannot be made elastic then")
            return LayerRuns.of(model, adapter, batches)
        except ArchitectureError as error:
            if scored:
                raise ArchitectureError(f"importance: {self.importance} is impossible: {error}; take flap") from error
            if self.totals:
                raise ArchitectureError(f"totals are impossible: {error}; give widths") from error
            if "repair" in self.model_fields_set:
                raise ArchitectureError(f"repair: {self.repair} is impossible: {error}; set repair: none") from error
            logger.warning("widths are not repaired: %s", error)
            self.repair, self.importance = NO_REPAIR, OF_CUT if unasked else self.importance
            return None

    def _task(
        self,
        model: PreTrainedModel,
        adapter: ArchitectureAdapter,
        batches: list[Batch],
        moments: ChannelMoments,
    ) -> WidthTask:
        importance, gradients, statistics = importance_named(self.importance), {}, moments.stats
        scored = isinstance(importance, Importance) and importance.needs_statistics
        if not statistics and (scored or self.bias_compensation):
            statistics = collect_statistics(model, adapter, batches)
        if isinstance(importance, GroupImportance) and importance.needs_gradients:
            gradients = loss_gradients(model, coupled_parameters(model, adapter), batches)
        widths = [parse_width(width) for width in self.widths]
        anchors = [] if isinstance(self.anchor_layers, int) else self.anchor_layers
        return WidthTask(
            model, adapter, importance, widths, statistics, gradients, self.allocation, self.round_to, anchors,
            self.bias_compensation, moments, [parse_width(total) for total in self.totals],
        )  # fmt: skip


def _tell(width: WidthStrategy) -> None:
    """Log how many units every width keeps, by kind: in every layer, or from the least to the most."""
    whole = width.units[Fraction(1)]
    for share in sorted(width.units, reverse=True)[1:]:
        kept: dict[str, list[int]] = {}
        for key, count in width.units[share].items():
            kept.setdefault(key.split(".")[1], []).append(count)
        most = {key.split(".")[1]: count for key, count in whole.items()}
        words = [
            f"{min(counts)}{f' to {max(counts)}' if len(set(counts)) > 1 else ''} of {most[name]} {name} units"
            for name, counts in kept.items()
        ]
        logger.info("width %s keeps %s in every layer", share, ", ".join(words))
