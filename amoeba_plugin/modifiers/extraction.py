"""SubnetExtractionModifier: turn the model into one of its subnets, so that quantization sees only that."""

from __future__ import annotations

import copy
import logging
from fractions import Fraction
from typing import Any

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr, field_validator, model_validator
from transformers import PreTrainedModel

from amoeba_plugin.deployment.budget import Budget
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import RecipeError
from amoeba_plugin.extraction.cut import become, extract
from amoeba_plugin.extraction.model_card import model_card
from amoeba_plugin.extraction.parity import compare_logits, with_parameters_in
from amoeba_plugin.modifiers.order import require_session_order
from amoeba_plugin.modifiers.saving import SAVED_IN, save_as_it_is
from amoeba_plugin.modifiers.selection import Selection, forget_selection, selection_for
from amoeba_plugin.modifiers.shape_search import SearchOptions
from amoeba_plugin.shape import SubnetShape, parse_width

logger = logging.getLogger(__name__)


class SubnetExtractionModifier(Modifier):
    """Cut one shape, with the adapter folded in, in place.

    Sample YAML::

        SubnetExtractionModifier: {shape: 24x7/8}
        SubnetExtractionModifier: {budget: {flow: "llama-cpp:Q4_0", decode: 12ms, "prefill[256]": 200ms}}

    Attributes:
        shape: DEPTHxWIDTH, a point of the space that selection made. No default.
        total: In place of a shape, one of ``WidthShrinkingModifier.totals``: the shape that was best of it.
        budget: In place of a shape, what it may cost on this machine: ``flow``, an engine at a scheme, and the most of
            ``prefill[TOKENS]``, ``decode``, ``load``, ``memory`` and ``file``, with units. The best shape is taken.
        search: How the best within a budget is found (:class:`SearchOptions`).
        portable: Where layers differ in size (``allocation: global``) or lack attention or MLP (``granularity:
            sublayer``): pad them with zeros to a stock class, which loads anywhere and is neither smaller nor faster.
            Default false: a per-layer class that comes with the checkpoint and loads with ``trust_remote_code=True``.
    """

    shape: str | None = None
    total: str | None = None
    budget: dict[str, str] | None = None
    search: SearchOptions | None = None
    portable: bool = False
    _card: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def card(self) -> dict[str, str]:
        """What the model card says of the subnet; empty before the extraction."""
        return self._card

    @field_validator("shape", mode="before")
    @classmethod
    def _shape_parses(cls, shape: Any) -> str | None:
        return None if shape is None else str(SubnetShape.parse(str(shape)))

    @field_validator("total", mode="before")
    @classmethod
    def _total_parses(cls, total: Any) -> str | None:
        return None if total is None else str(parse_width(total))

    @model_validator(mode="after")
    def _one_is_given(self) -> SubnetExtractionModifier:
        if [self.shape, self.total, self.budget].count(None) != 2:
            raise RecipeError(
                "SubnetExtractionModifier cuts one subnet; give shape: DEPTHxWIDTH, or total: a share of the whole "
                "model that WidthShrinkingModifier.totals names, or budget: what it may cost in an engine"
            )
        if self.budget is None and self.search is not None:
            raise RecipeError("search says how the best shape within a budget is found; give a budget, or leave it out")
        if self.budget is not None:
            Budget.of_fields(self.budget)  # refuses one that is none
        return self

    @property
    def limits(self) -> Budget | None:
        """The budget, read."""
        return None if self.budget is None else Budget.of_fields(self.budget)

    @property
    def how(self) -> SearchOptions:
        """How the best shape within the budget is found."""
        return self.search or SearchOptions()

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Replace the model by its subnet; the object stays the same for whoever holds it."""
        require_session_order(self)
        selection = selection_for(state)
        elastic = selection.require_elastic(state.model)
        asked = self.limits
        shape = elastic.space.require(self._named(selection, elastic))
        subnet = extract(elastic, shape, self.portable)
        adapter = "none" if selection.peft_model is None else "fold"
        self._card = model_card(elastic, subnet, shape, adapter, self.portable)
        if asked is not None:
            self._card["chosen"] = f"the best within {asked}"
        if len({parameter.device for parameter in subnet.parameters()}) == 1:  # else it may not fit where one runs
            self._card["parity"] = compare_logits(elastic, shape, _as_saved(subnet)).in_words
        parity = f"; {self._card['parity']}" if "parity" in self._card else ""
        logger.info("subnet %s has %s parameters%s", shape, self._card["parameters"], parity)
        forget_selection(state.model)
        become(state.model, subnet)
        return True

    def _named(self, selection: Selection, elastic: ElasticModel) -> SubnetShape | str:
        if self.shape is not None:
            return self.shape
        if self.limits is not None:
            found = self.how.best(elastic, self.limits, selection.batches)
            logger.info(
                "within %s the best of %s shapes is %s at %s", self.limits, found.shapes, found.chosen, found.flow
            )
            self.shape, self.budget, self.search = found.chosen, None, None  # the recipe saved names it
            return found.chosen
        assert self.total is not None
        known = selection.totals.get(Fraction(self.total))
        if known is None:
            others = ", ".join(map(str, selection.totals)) or "none"
            raise RecipeError(
                f"total {self.total}: no shape was chosen for it; WidthShrinkingModifier.totals has {others}"
            )
        self.shape, self.total = str(known), None  # the recipe saved beside the checkpoint names it
        return known

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """See to it that the subnet's own configuration is saved."""
        save_as_it_is(state.model, self._card)
        return True


def _as_saved(subnet: PreTrainedModel) -> PreTrainedModel:
    dtype = SAVED_IN.get()
    return subnet if dtype in (None, subnet.dtype) else with_parameters_in(copy.deepcopy(subnet), dtype)
