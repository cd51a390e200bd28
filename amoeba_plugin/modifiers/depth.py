"""DepthShrinkingModifier: which layers every depth keeps, as a recipe step."""

from __future__ import annotations

from typing import Any

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field, field_validator, model_validator

from amoeba_plugin.depth_selectors import DepthTask
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.modifiers.order import require_session_order
from amoeba_plugin.modifiers.selection import on_main_device, selection_for
from amoeba_plugin.plugins import depth_selector_named, objective_named
from amoeba_plugin.strategy import DepthStrategy


class DepthShrinkingModifier(Modifier):
    """Find, for every depth, which layers to keep (AmoebaLLM, arXiv:2411.10606, section 4.1).

    Sample YAML::

        select_stage:
          amoeba_select_modifiers:
            DepthShrinkingModifier: {min_depth: 20, keep_last: 1, objective: loss}

    Attributes:
        min_depth: Layers the smallest subnet keeps. No default.
        keep_last: Last layers that are never removed. Default 1, as in the paper.
        selector: ``dynamic_program`` (the paper's), or a published one that it is compared with: ``block_influence``
            (ShortGPT), ``one_shot``, ``taylor``, ``taylor_plus``, ``magnitude``, ``magnitude_plus`` (Shortened LLaMA),
            ``angular_distance``, ``last_layers`` (Gromov et al.), or a plugin's. Default ``dynamic_program``.
        objective: ``loss`` (mean nats per token), ``perplexity``, ``accuracy`` (multiple choice), or a plugin's.
            Default ``loss``.
        beam: With ``dynamic_program``: sets of layers that each state of the program keeps; 1 is the paper, more find
            better layers in up to ``beam`` times the time. Default 1.
        exchanges: With ``dynamic_program``: rounds after the program, in each of which every depth tries to exchange
            one removed layer for one kept; 0 is the paper. Default 0.
        cache_gib: With ``dynamic_program``: GiB of hidden states held in memory, and on an accelerator as much again on
            the CPU; the rest is held in files. Default 4.
        resume_dir: With ``dynamic_program``: a directory that keeps every score, so that a killed search goes on where
            it was. Default ``None``.
        max_batches: Calibration batches used, ``None`` for all. Default ``None``.
        kept_layers: Per depth, the layers to keep. Given: nothing is searched. Else filled in by the search, so that
            the recipe written beside a checkpoint repeats its selection.
    """

    min_depth: int = Field(ge=1)
    keep_last: int = Field(default=1, ge=0)
    selector: str = "dynamic_program"
    objective: str = "loss"
    beam: int = Field(default=1, ge=1)
    exchanges: int = Field(default=0, ge=0)
    cache_gib: float = Field(default=4.0, gt=0)
    resume_dir: str | None = None
    max_batches: int | None = Field(default=None, ge=1)
    kept_layers: dict[str, list[int]] | None = None

    @field_validator("objective")
    @classmethod
    def _objective_exists(cls, name: str) -> str:
        objective_named(name)
        return name

    @field_validator("selector")
    @classmethod
    def _selector_exists(cls, name: str) -> str:
        depth_selector_named(name)
        return name

    @model_validator(mode="after")
    def _options_belong_to_the_selector(self) -> DepthShrinkingModifier:
        taken = depth_selector_named(self.selector).options
        for name in depth_selector_named("dynamic_program").options:
            if name not in taken and getattr(self, name) != type(self).model_fields[name].default:
                raise RecipeError(
                    f"{name} means nothing to selector {self.selector}: it is the dynamic program's; leave it out, or "
                    "take selector: dynamic_program"
                )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Search on the calibration data, or take the layers given."""
        require_session_order(self)
        selection = selection_for(state)
        if self.kept_layers is None:
            with on_main_device(state.model), selection.timed("depth search"):
                selector = depth_selector_named(self.selector)
                selection.depth = selector.select(
                    DepthTask(
                        state.model,
                        selection.adapter,
                        objective_named(self.objective),
                        selection.batches[: self.max_batches],
                        min_depth=self.min_depth,
                        keep_last=self.keep_last,
                        options={name: getattr(self, name) for name in selector.options},
                    )
                )
            self.kept_layers = {str(depth): list(kept) for depth, kept in selection.depth.kept.items()}
        else:
            layers = len(selection.adapter.layers(state.model))
            selection.depth = DepthStrategy.given(self.kept_layers, layers, self.objective)
        return True
