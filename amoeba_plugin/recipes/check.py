"""The check of a recipe, with or without the model that it is meant for; no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_plugin.recipes.notes import notes
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.runtime.model_files import load_config


@dataclass(frozen=True)
class Checked:
    """What can run.

    Attributes:
        source: Where the recipe is from.
        rows: Of every modifier its number, name and group, and the fields that the recipe gives it.
        costs: What each stage that measures or trains takes, in sentences; of a model that is known.
        needs: What a run takes of memory and disk, in sentences; of a model that is known.
        notes: What to know of it all the same.
    """

    source: str
    rows: tuple[tuple[str, str, str, str], ...]
    costs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_recipe(recipe: str, model: str | None = None, samples: int = 512, length: int = 512) -> Checked:
    """Check a recipe, and against a model's configuration where one is given.

    Args:
        recipe: Path of a recipe file, or the name of a shipped one.
        model: Path or hub id; the weights in a directory have to be whole.
        samples: Sequences of calibration data that the run will have.
        length: Tokens of each.

    Raises:
        AmoebaError: On the first thing that cannot run; the message says where it stands and what to do.
    """
    plan, model_plan = plan_recipe(recipe), None
    costs: list[str] = []
    needs: list[str] = []
    if model is not None:
        from amoeba_plugin.recipes.budgeted import budget_in_words
        from amoeba_plugin.recipes.estimate import estimated, stage_costs
        from amoeba_plugin.recipes.needs import needs_in_words
        from amoeba_plugin.runtime.generation_defaults import require_generation_defaults
        from amoeba_plugin.runtime.whole_weights import has_weights, require_weights

        config = load_config(model)
        model_plan = plan.against(config)
        require_generation_defaults(model)
        if has_weights(model):  # else it is a configuration alone, or on the hub
            require_weights(model, config)
        costs = [*estimated(stage_costs(plan, config, samples, length), config), *budget_in_words(plan, model_plan)]
        needs = needs_in_words(plan, model_plan, model, samples, length)
    rows = []
    for number, modifier in enumerate(plan.modifiers, start=1):
        given = modifier.model_dump(exclude_unset=True, exclude={"group"})
        fields = ", ".join(f"{name}={value}" for name, value in given.items())
        rows.append((str(number), type(modifier).__name__, modifier.group, fields))
    return Checked(plan.source, tuple(rows), tuple(costs), tuple(needs), tuple(notes(plan, model_plan)))
