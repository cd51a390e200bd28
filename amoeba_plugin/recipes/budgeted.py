"""A recipe that takes the best shape within a budget: what its shapes will cost, before the model loads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_plugin.data.text import require_file
from amoeba_plugin.deployment.loads import uniform_sizes
from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.profiling.profile import Profile
from amoeba_plugin.deployment.profiling.subjects import Subject
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.deployment.search.preflight import knows, profile_for, require_possible
from amoeba_plugin.deployment.search.registry import evaluator_named, searcher_named
from amoeba_plugin.recipes.expected import ExpectedDepths
from amoeba_plugin.shape import SubnetShape, parse_width

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from amoeba_plugin.deployment.budget import Budget
    from amoeba_plugin.modifiers.shape_search import SearchOptions
    from amoeba_plugin.recipes.model_plan import ModelPlan
    from amoeba_plugin.recipes.plan import RecipePlan

logger = logging.getLogger(__name__)
EIGHTH = Fraction(1, 8)


def prepare_budget(plan: RecipePlan, model_plan: ModelPlan, model: str) -> None:
    """Profile what a recipe's budget is about, where that is not known, and refuse a budget that no shape can keep.

    Args:
        plan: Of the recipe; without a budget there is nothing to do.
        model_plan: The same, against the model's configuration.
        model: Path or hub id.

    Raises:
        AmoebaError: If engine or searcher are unknown, the profile is of something else, or no shape keeps the budget.
    """
    if plan.extraction is not None and plan.extraction.limits is not None:
        plan.asking(plan.extraction, _prepare, plan, model_plan, model, plan.extraction.limits, plan.extraction.how)


def budget_in_words(plan: RecipePlan, model_plan: ModelPlan) -> list[str]:
    """Return what a profile that is there says of a recipe's budget; nothing is measured.

    Raises:
        AmoebaError: As :func:`prepare_budget`.
    """
    if plan.extraction is None or plan.extraction.limits is None:
        return []
    budget, path = plan.extraction.limits, Path(plan.extraction.how.profile)
    plan.asking(plan.extraction, _require_known, budget, plan.extraction.how)
    points = " and ".join(map(str, budget.points))
    profile = Profile.load(path) if path.exists() else None
    if profile is None or not knows(profile, budget):
        return [f"what shapes cost in {points} is measured first, into {path}: about a minute for a small model"]
    works = expected_works(plan, model_plan)
    possible = plan.asking(plan.extraction, require_possible, budget, profile, works)
    return [f"{len(possible)} of {len(works)} shapes may keep {budget}, the largest {possible[0]}"]


def expected_works(plan: RecipePlan, model_plan: ModelPlan) -> dict[SubnetShape, Work]:
    """Return sizes of the shapes that a recipe will make, layers alike; what selection finds is about as large."""
    config, adapter = model_plan.config, model_plan.adapter
    assert adapter is not None  # of recipes that extract
    round_to = 1 if plan.width is None else plan.width.round_to
    return {shape: Work.of(uniform_sizes(adapter, config, shape, round_to)) for shape in expected_shapes(plan, config)}


def _prepare(plan: RecipePlan, model_plan: ModelPlan, model: str, budget: Budget, search: SearchOptions) -> None:
    _require_known(budget, search)
    works, subject = expected_works(plan, model_plan), budget_subject(plan, model_plan, model)
    path = Path(search.profile)
    possible = require_possible(budget, profile_for(budget, subject, path, model), works)
    logger.info("%d of %d shapes may keep %s, the largest %s", len(possible), len(works), budget, possible[0])


def budget_subject(plan: RecipePlan, model_plan: ModelPlan, model: str) -> Subject:
    """Return what is profiled for a recipe's budget: its depths, and widths by eighths down to below its narrowest."""
    shapes = list(expected_shapes(plan, model_plan.config))
    narrowest = min(shape.width for shape in shapes)
    depths = sorted({int(shape.depth) for shape in shapes}, reverse=True)
    widths = [Fraction(1) - EIGHTH * step for step in range(8)]
    asked = [str(width) for width in widths if width >= narrowest - EIGHTH]
    return subject_of(model, None, [str(depth) for depth in depths], asked)


def _require_known(budget: Budget, search: SearchOptions) -> None:
    for point in budget.points:
        flow, _ = point_named(str(point))
        flow.command()  # refuses where the engine is missing
    searcher_named(search.searcher), evaluator_named(search.evaluator)
    if search.dataset is not None:
        require_file(search.dataset)


def expected_shapes(plan: RecipePlan, config: PretrainedConfig) -> Iterator[SubnetShape]:
    """Yield a recipe's shapes, the largest first; of a total at every depth the width that makes it up."""
    layers = config.num_hidden_layers
    depths = _depths(ExpectedDepths.of(plan.depth, layers))
    widths = {Fraction(1)} if plan.width is None else {parse_width(width) for width in plan.width.widths}
    totals = [] if plan.width is None else [parse_width(total) for total in plan.width.totals]
    for depth in depths:
        shares = {total * layers / Fraction(depth) for total in totals}
        for width in sorted(widths | {share for share in shares if share <= 1}, reverse=True):
            yield SubnetShape(depth, width)


def _depths(expected: ExpectedDepths) -> list[int]:
    modifier, layers = expected.modifier, expected.num_layers
    if modifier is None:
        return [layers]
    if expected.given is not None:
        return sorted({int(depth) for depth in expected.given.kept}, reverse=True)
    if modifier.depths is not None:
        return sorted({layers, *(int(depth) for depth in modifier.depths)}, reverse=True)
    return list(range(layers, modifier.least_depth(layers) - 1, -1))
