"""A recipe's modifiers by their roles, the shapes it names, and where each of them stands in the file.

``RecipePlan.against`` checks it against a model's configuration, and returns what only both together tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import filterfalse
from pathlib import Path
from typing import Any, TypeVar

from llmcompressor.recipe import Recipe
from transformers import PretrainedConfig

from amoeba_plugin.deployment.schemes import require_readable
from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.subnet_config import config_for, weightless
from amoeba_plugin.errors import AmoebaError, RecipeError, ShapeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.expert_linears import take_apart
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.modifiers import (
    AdaptiveLayerTuningModifier,
    DepthShrinkingModifier,
    LayerwisePolicyModifier,
    OneForAllDistillationModifier,
    SubnetExtractionModifier,
    WidthShrinkingModifier,
)
from amoeba_plugin.modifiers.order import require_order, tunes_behind
from amoeba_plugin.modifiers.own_stage import needs_own_stage
from amoeba_plugin.modifiers.selection import named_directories
from amoeba_plugin.modifiers.smoothing import require_accelerator, require_outputs_kept, smooths
from amoeba_plugin.recipes.expected import ExpectedDepths, ExpectedWidths, expected_sizes
from amoeba_plugin.recipes.model_plan import ModelPlan, known_architecture, require_full_precision, require_linears
from amoeba_plugin.recipes.places import require_apart, require_new_directory
from amoeba_plugin.recipes.quantization import require_divisible
from amoeba_plugin.shape import SubnetShape, parse_width

ModifierT = TypeVar("ModifierT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class RecipePlan:
    """A recipe whose every key is known and whose every value is in range.

    Attributes:
        source: The file's path, or ``<text>``.
        modifiers: llm-compressor modifiers, in the order in which they run.
        lines: Of each the line it stands on.
    """

    source: str
    modifiers: tuple[Any, ...]
    lines: tuple[int, ...]

    @cached_property
    def depth(self) -> DepthShrinkingModifier | None:
        """The modifier that selects layers."""
        return self._only(DepthShrinkingModifier)

    @cached_property
    def width(self) -> WidthShrinkingModifier | None:
        """The modifier that selects channels."""
        return self._only(WidthShrinkingModifier)

    @cached_property
    def training(self) -> OneForAllDistillationModifier | None:
        """The modifier that trains."""
        return self._only(OneForAllDistillationModifier)

    @cached_property
    def extraction(self) -> SubnetExtractionModifier | None:
        """The modifier that cuts a subnet."""
        return self._only(SubnetExtractionModifier)

    @cached_property
    def structural(self) -> tuple[Any, ...]:
        """The modifiers of this package that change the model's structure or train it, inside the host's session."""
        return tuple(filter(_is_structural, self.in_session))

    @cached_property
    def rest(self) -> tuple[Any, ...]:
        """The modifiers of others, and the policy that fills them."""
        return tuple(filterfalse(_is_structural, self.in_session))

    @cached_property
    def in_session(self) -> tuple[Any, ...]:
        """All modifiers but one that tunes a quantized checkpoint."""
        return tuple(modifier for modifier in self.modifiers if modifier is not self.tuned_behind)

    @cached_property
    def tuning(self) -> AdaptiveLayerTuningModifier | None:
        """The modifier that tunes windows of layers."""
        return self._only(AdaptiveLayerTuningModifier)

    @cached_property
    def tuned_behind(self) -> AdaptiveLayerTuningModifier | None:
        """The same, where it works on the checkpoint that quantization has written."""
        return self.tuning if tunes_behind(self.modifiers) else None

    @cached_property
    def policy(self) -> LayerwisePolicyModifier | None:
        """The modifier that chooses bits and sparsity layer by layer."""
        return self._only(LayerwisePolicyModifier)

    @cached_property
    def shape(self) -> SubnetShape | None:
        """The shape to extract; ``None``: none, or one that the selection will choose for a total."""
        named = None if self.extraction is None else self.extraction.shape
        return None if named is None else SubnetShape.parse(named)

    @cached_property
    def shapes(self) -> tuple[tuple[Any, SubnetShape], ...]:
        """All shapes that the recipe names, to extract and to draw from in training, with the modifier that does."""
        named = [] if self.shape is None else [(self.extraction, self.shape)]
        sampled = [] if self.training is None else self.training.sampled_shapes
        drawn = [] if isinstance(sampled, str) else [(self.training, SubnetShape.parse(each)) for each in sampled]
        return (*named, *drawn)

    @cached_property
    def named_directories(self) -> tuple[tuple[Any, str, Path], ...]:
        """What the recipe writes beside the output directory: modifier, its field, and the directory."""
        return tuple(
            (modifier, field, directory)
            for modifier in self.modifiers
            if _is_structural(modifier)
            for field, directory in named_directories(modifier).items()
        )

    @property
    def needs_data(self) -> bool:
        """Whether a modifier wants calibration data."""
        measures = (
            bool(self.structural) or self.tuning is not None or (self.policy is not None and not self.policy.is_decided)
        )
        return measures or any(modifier.requires_calibration_data for modifier in self.modifiers)

    @property
    def card(self) -> dict[str, str]:
        """What the extraction of this very plan found for the model card; empty where ``oneshot`` ran a copy of it."""
        return {} if self.extraction is None else self.extraction.card

    @property
    def sizes_unknown(self) -> bool:
        """Whether the selection decides the sizes of what is extracted."""
        if self.width is None or self.extraction is None:
            return False
        if self.shape is None:  # of a total
            return True
        return self.width.allocation != "uniform" and self.shape.width != 1

    def where(self, modifier: Any) -> str:
        """Return where a modifier stands, for messages: "recipe.yaml, line 4: DepthShrinkingModifier"."""
        line = next(line for each, line in zip(self.modifiers, self.lines, strict=True) if each is modifier)
        return f"{self.source}, line {line}: {type(modifier).__name__}"

    def asking(self, modifier: Any, check: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Return what a check answers; what it refuses is told with the place of the modifier that it is about."""
        try:
            return check(*arguments)
        except AmoebaError as error:
            raise type(error)(f"{self.where(modifier)}: {error}") from error

    def require_consistent(self) -> None:
        """Refuse modifiers that each are right and cannot run together, whatever the model.

        Raises:
            RecipeError: If their order cannot work, or their fields contradict each other.
            ShapeError: If the recipe names a shape that its selection does not make.
        """
        self._require_order()
        depth, width = self.depth, self.width
        if depth is not None and isinstance(depth.min_depth, int) and depth.keep_last > depth.min_depth:
            raise RecipeError(
                f"{self.where(depth)}: keep_last {depth.keep_last} of min_depth {depth.min_depth}: the smallest subnet "
                "cannot keep more last layers than it has layers; lower keep_last or raise min_depth"
            )
        widths = {Fraction(1)} if width is None else {parse_width(each) for each in width.widths}
        for modifier, shape in self.shapes:
            self.asking(modifier, _require_depth, shape, depth)
            self.asking(modifier, _require_width, shape, widths)
        if self.policy is not None:
            self.asking(self.policy, self.policy.hosts, list(self.modifiers))
        if self.tuned_behind is not None:
            self.asking(self.tuned_behind, self.tuned_behind.require_runnable_behind)
        if self.extraction is not None and self.extraction.total is not None:
            self.asking(self.extraction, _require_total, self.extraction.total, width)

    def _require_order(self) -> None:
        try:
            require_order(self.modifiers)
            Recipe(modifiers=list(self.modifiers))  # the host's own rules
        except AmoebaError as error:
            raise RecipeError(f"{self.source}: {error}") from error
        except ValueError as error:
            raise RecipeError(f"{self.source}: {str(error).partition('Value error, ')[2] or error}") from error

    def require_runnable(self, output_dir: Path) -> None:
        """Refuse what this machine cannot run, and directories that are not free.

        Raises:
            ArtifactError: If the output directory, or one that the recipe names, holds something else, or cannot be
                written.
            RecipeError: If two of the directories are one, or are in each other; or a modifier wants an accelerator.
        """
        for modifier in self.modifiers:
            self.asking(modifier, require_accelerator, modifier)
        require_new_directory(output_dir)
        for modifier, field, directory in self.named_directories:
            self.asking(modifier, require_apart, field, directory, output_dir)

    def against(self, config: PretrainedConfig) -> ModelPlan:
        """Check the recipe against the sizes of the model it is meant for; weights are not needed.

        Raises:
            ArchitectureError: If the architecture is not supported, the model quantized, no class holds the shape, or
                SmoothQuant or AWQ would change what the model computes.
            RecipeError: If layers or linears named, ``min_depth``, ``round_to`` or a group size do not fit the model.
            ShapeError: If the shape to extract is outside the space.
        """
        require_full_precision(config)
        needed = self.structural or self.policy or self.tuning
        adapter = architecture_of(config) if needed else known_architecture(config)
        subnet = config if adapter is None or not self.structural else self._subnet_config(config, adapter)
        own_stage = False
        if self.structural:
            whole = weightless(config)
            own_stage = needs_own_stage(whole)
            if self.training is not None and self.training.adapter != "none":
                self.asking(self.training, require_linears, self.training.adapter.target_modules or (), whole)
        plan = ModelPlan(config, adapter, subnet, own_stage)
        if self.tuning is not None:
            self.asking(self.tuning, self.tuning.require_fits, plan.subnet)
            if self.tuning.adapter != "none":
                names = self.tuning.adapter.target_modules or ()
                self.asking(self.tuning, require_linears, names, weightless(plan.subnet))
        if self.policy is not None and adapter is not None and not self.sizes_unknown:
            self.asking(self.policy, self.policy.require_fits, list(self.modifiers), weightless(plan.subnet), adapter)
        self._require_quantizable(plan)
        return plan

    def _subnet_config(self, config: PretrainedConfig, adapter: ArchitectureAdapter) -> PretrainedConfig:
        """Return the configuration that quantization will see: the subnet's, as far as it is known."""
        layers, groups = config.num_hidden_layers, adapter.channel_groups(config)
        depths = self.asking(self.depth, ExpectedDepths.of, self.depth, layers)
        widths = self.asking(self.width, ExpectedWidths.of, self.width, groups, layers)
        for modifier, shape in self.shapes:
            self.asking(modifier, depths.require, shape)
        if self.extraction is None:
            return config
        if self.shape is None:
            sizes = LayerSizes(range(layers), [widths.least_of_all] * layers, {})
        else:
            sizes = expected_sizes(depths, widths, self.shape, self.extraction.portable)
        return self.asking(self.extraction, config_for, adapter, config, sizes)

    def _require_quantizable(self, plan: ModelPlan) -> None:
        quantizing = [each for each in self.modifiers if hasattr(each, "resolve_quantization_config")]
        quantizations = [modifier.resolve_quantization_config() for modifier in quantizing]
        if quantizing:
            model = weightless(plan.subnet)
            if plan.adapter is not None and plan.has_experts:
                model = take_apart(model, plan.adapter)
                self.asking(quantizing[0], require_readable, quantizations, model)
            for modifier, quantization in zip(quantizing, quantizations, strict=True):
                self.asking(modifier, require_divisible, quantization, model, self.sizes_unknown)
        if plan.adapter is None:  # nothing here knows how to make such a model small; the recipe only quantizes it
            return
        for modifier in filter(smooths, self.modifiers):
            self.asking(modifier, require_outputs_kept, modifier, quantizations, plan.subnet, plan.adapter)

    def _only(self, kind: type[ModifierT]) -> ModifierT | None:
        return next((modifier for modifier in self.modifiers if isinstance(modifier, kind)), None)


def _require_depth(shape: SubnetShape, depth: DepthShrinkingModifier | None) -> None:
    if depth is not None and isinstance(depth.min_depth, int) and shape.depth < depth.min_depth:
        raise ShapeError(
            f"shape {shape} is outside the space: its depth is below min_depth {depth.min_depth}; take "
            f"{depth.min_depth} layers or more, or lower min_depth"
        )
    in_parts = depth is not None and (depth.granularity == "sublayer" or depth.kept_layers is not None)
    if shape.depth != int(shape.depth) and not in_parts:
        raise ShapeError(
            f"shape {shape} keeps half a layer, an attention or an MLP alone; set granularity: sublayer in "
            "DepthShrinkingModifier, or take whole layers"
        )


def _require_total(total: str, width: WidthShrinkingModifier | None) -> None:
    known = [] if width is None else width.totals
    if total not in known:
        raise RecipeError(
            f'total {total} is none that WidthShrinkingModifier chooses a shape for; add "{total}" to its totals'
            + (f", or take one of {', '.join(known)}" if known else "")
        )


def _require_width(shape: SubnetShape, widths: Collection[Fraction]) -> None:
    if shape.width not in widths:
        known = ", ".join(str(each) for each in sorted(widths, reverse=True))
        raise ShapeError(
            f"shape {shape} is outside the space: the widths are {known}; take one of these, or add "
            f'"{shape.width}" to WidthShrinkingModifier.widths'
        )


def _is_structural(modifier: Any) -> bool:
    ours = type(modifier).__module__.startswith("amoeba_plugin.")
    return ours and not isinstance(modifier, LayerwisePolicyModifier)
