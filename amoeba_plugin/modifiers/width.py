"""WidthShrinkingModifier: importance of KV groups and MLP neurons, as a recipe step."""

from __future__ import annotations

from typing import Any, Literal

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field, field_validator

from amoeba_plugin.calibration import collect_statistics
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.modifiers.order import require_session_order
from amoeba_plugin.modifiers.selection import on_main_device, selection_for
from amoeba_plugin.plugins import importance_named
from amoeba_plugin.shape import parse_width
from amoeba_plugin.width import rank_widths


class WidthShrinkingModifier(Modifier):
    """Rank the units of every layer and decide how many each width keeps (FLAP, arXiv:2312.11983).

    Sample YAML::

        WidthShrinkingModifier: {widths: ["1", "7/8", "3/4", "5/8"], importance: flap}

    Attributes:
        widths: Shares of channels kept, exact fractions in (0, 1]; 1 must be among them. No default.
        importance: ``flap`` (weighted input fluctuation), ``flap_ifv``, ``flap_wifn``, ``wanda``, ``magnitude``, or a
            plugin's.
        allocation: ``uniform``, the same sizes in every layer (stock classes can load them), or ``global``, the
            paper's one threshold over all layers (elastic use only). Default ``uniform``.
        round_to: Channels that kept sizes are multiples of, for all groups or per group (``attention``, ``mlp``).
            Default 1. W4A16 quantization with groups of 128 wants 128.
        bias_compensation: Add what missing channels contributed on average to the output bias. Default false.
    """

    widths: list[str]
    importance: str = "flap"
    allocation: Literal["uniform", "global"] = "uniform"
    round_to: int | dict[str, int] = Field(default=1)
    bias_compensation: bool = False

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

    @field_validator("importance")
    @classmethod
    def _importance_exists(cls, name: str) -> str:
        importance_named(name)
        return name

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Collect statistics on the dense model and rank."""
        require_session_order(self)
        selection = selection_for(state)
        with on_main_device(state.model), selection.timed("width ranking"):
            needed = importance_named(self.importance).needs_statistics or self.bias_compensation
            statistics = collect_statistics(state.model, selection.adapter, selection.batches) if needed else {}
            selection.width = rank_widths(
                state.model,
                selection.adapter,
                statistics,
                widths=[parse_width(width) for width in self.widths],
                importance=importance_named(self.importance),
                allocation=self.allocation,
                round_to=self.round_to,
                bias_compensation=self.bias_compensation,
            )
        return True
