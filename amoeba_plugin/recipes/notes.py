"""What a recipe may do and its user should know before hours are spent: not refused, but told."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from amoeba_plugin.models.adapter import ChannelGroup
    from amoeba_plugin.modifiers import WidthShrinkingModifier
    from amoeba_plugin.recipes.model_plan import ModelPlan
    from amoeba_plugin.recipes.plan import RecipePlan


def notes(plan: RecipePlan, model_plan: ModelPlan | None = None) -> list[str]:
    """Return what to know of a recipe, each in a sentence or two.

    Args:
        plan: Of the recipe.
        model_plan: The same, against a model's configuration, where there is one.
    """
    told = list(_own_class(plan))
    if plan.width is not None and model_plan is not None and model_plan.adapter is not None:
        told += _without_choice(plan.width, model_plan.adapter.channel_groups(model_plan.config))
    return told


def _own_class(plan: RecipePlan) -> Iterator[str]:
    extraction, shape = plan.extraction, plan.shape
    if extraction is not None and extraction.portable:
        return
    reasons = []
    if plan.width is not None and (shape is None or shape.width != 1):
        reasons += ["allocation: global"] if plan.width.allocation == "global" else []
        reasons += ["anchor_layers"] if plan.width.anchor_count else []
    if plan.depth is not None and plan.depth.granularity == "sublayer":
        reasons.append("granularity: sublayer")
    if reasons:
        verb = "gives" if len(reasons) == 1 else "give"
        pads = "amoeba extract --portable" if extraction is None else "portable: true in SubnetExtractionModifier"
        yield (
            f"{' and '.join(reasons)} {verb} subnets whose layers differ: they bring a class of their own and load "
            f"with trust_remote_code=True only; {pads} pads them to a stock class, which is no smaller and no faster"
        )


def _without_choice(width: WidthShrinkingModifier, groups: Sequence[ChannelGroup]) -> Iterator[str]:
    """Yield the groups of which rounding leaves fewer than two sizes, beside the whole one, to choose from."""
    from amoeba_plugin.selection.width.allocation import rounding_steps

    steps, natural = rounding_steps(groups, width.round_to), rounding_steps(groups, 1)
    for group in groups:
        left, possible = (_smaller(group.units, each[group.name]) for each in (steps, natural))
        enough = min(2, possible)
        if left >= enough:
            continue
        asked = width.round_to if isinstance(width.round_to, int) else width.round_to[group.name]
        fitting = next(
            each
            for each in range(asked, 0, -1)
            if asked % each == 0 and _smaller(group.units, rounding_steps([group], each)[group.name]) >= enough
        )
        sizes = "one smaller size" if left else "no smaller size"
        yield (
            f"round_to {asked} leaves {group.name} of this model {sizes} than its {group.units} units of "
            f"{group.consumer.channels_per_unit} channels: there is nothing to choose; round_to {fitting} leaves more"
        )


def _smaller(units: int, step: int) -> int:
    """Return how many multiples of a step are smaller than the whole.

    >>> _smaller(3, 2), _smaller(3, 1), _smaller(4, 4)
    (1, 2, 0)
    """
    return (units - 1) // step
