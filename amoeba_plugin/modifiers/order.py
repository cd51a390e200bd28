"""The order in which modifiers can follow one another: select, train, extract, tune layers, choose a policy, quantize.

Layers may be tuned last of all instead, behind the quantization: that is a stage of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier

from amoeba_plugin.errors import RecipeError

POLICY, TUNING = "LayerwisePolicyModifier", "AdaptiveLayerTuningModifier"
STAGES = {
    "DepthShrinkingModifier": 0,
    "WidthShrinkingModifier": 0,
    "OneForAllDistillationModifier": 1,
    "SubnetExtractionModifier": 2,
    POLICY: 3,
}
EXPECTED = ", ".join([*STAGES, "quantization"])


def require_order(modifiers: Sequence[Modifier]) -> None:
    """Refuse an order that cannot work.

    Args:
        modifiers: All modifiers of a recipe, in the order in which they run.

    Raises:
        RecipeError: If one of ours comes twice or too late, if a host's modifier stands before or between ours, or if
            the result of training would be lost.
    """
    require_tuning_place(modifiers)
    modifiers = [modifier for modifier in modifiers if type(modifier).__name__ != TUNING]
    names = [type(modifier).__name__ for modifier in modifiers]
    ours = [name for name in names if name in STAGES]
    if not ours:
        return
    for name in set(ours):
        if ours.count(name) > 1:
            raise RecipeError(f"{name} comes {ours.count(name)} times; a recipe has it once")
    if ours != sorted(ours, key=STAGES.__getitem__):
        raise RecipeError(f"the order {' -> '.join(ours)} cannot work; the order is {EXPECTED}")
    last = len(names) - 1 - names[::-1].index(ours[-1])
    strangers = [name for name in names[:last] if name not in STAGES]
    if strangers:
        does = "chooses for those behind it" if ours[-1] == POLICY else "changes the model's structure"
        raise RecipeError(f"{strangers[0]} stands before {ours[-1]}, which {does}; the order is {EXPECTED}")
    if ours == [POLICY]:  # nothing of the structure changes
        return
    extracts = "SubnetExtractionModifier" in ours
    structural = [name for name in ours if name != POLICY]
    if (names[last + 1 :] or POLICY in ours) and not extracts:
        follower = POLICY if POLICY in ours else names[last + 1]
        raise RecipeError(
            f"{follower} follows {structural[-1]} with no SubnetExtractionModifier between them: it would work on the "
            "whole model and the selection would be lost; add SubnetExtractionModifier with a shape"
        )
    trainer = next(
        (modifier for modifier in modifiers if type(modifier).__name__ == "OneForAllDistillationModifier"), None
    )
    if not extracts and not getattr(trainer, "elastic_dir", None):
        raise RecipeError(
            "this recipe keeps nothing of its selection: add elastic_dir to OneForAllDistillationModifier (an elastic "
            "checkpoint, any shape later), or SubnetExtractionModifier with a shape"
        )


def tunes_behind(modifiers: Sequence[Modifier]) -> bool:
    """Tell whether layers are tuned behind modifiers of others, such as a quantization."""
    names = [type(modifier).__name__ for modifier in modifiers]
    return TUNING in names and any(name not in STAGES for name in names[: names.index(TUNING)])


def require_tuning_place(modifiers: Sequence[Modifier]) -> None:
    """Refuse layer tuning where it cannot stand.

    Raises:
        RecipeError: If it comes twice, between modifiers of others, or in front of what changes the structure.
    """
    names = [type(modifier).__name__ for modifier in modifiers]
    if TUNING not in names:
        return
    if names.count(TUNING) > 1:
        raise RecipeError(f"{TUNING} comes {names.count(TUNING)} times; a recipe has it once")
    behind = names[names.index(TUNING) + 1 :]
    if tunes_behind(modifiers) and behind:
        raise RecipeError(
            f"{behind[0]} stands behind {TUNING}, which stands behind a quantization: tune in front of it, or last of "
            "all"
        )
    structural = [name for name in behind if name in STAGES and name != POLICY]
    if structural:
        raise RecipeError(f"{TUNING} stands before {structural[0]}, which changes the structure; tune what comes of it")
    if any(name in STAGES and name != POLICY for name in names) and "SubnetExtractionModifier" not in names:
        raise RecipeError(
            f"{TUNING} follows a selection with no SubnetExtractionModifier between them: it would tune the whole "
            "model; add SubnetExtractionModifier with a shape"
        )


def require_session_order(modifier: Modifier) -> None:
    """Check the recipe of the active session, if this modifier belongs to it (a modifier driven by hand is not
    checked)."""
    modifiers = active_session().lifecycle.recipe.modifiers
    if any(each is modifier for each in modifiers):
        require_order(modifiers)
        if tunes_behind(modifiers):
            raise RecipeError(
                f"{TUNING} behind a quantization is a stage of its own, on the checkpoint that was saved and loaded "
                "again, which oneshot cannot do; run the same recipe with `amoeba run`"
            )


def extraction_follows(modifier: Modifier) -> bool:
    """Tell whether the active session's recipe cuts a subnet after this modifier."""
    modifiers = active_session().lifecycle.recipe.modifiers
    place = next((place for place, each in enumerate(modifiers) if each is modifier), len(modifiers))
    return any(type(each).__name__ == "SubnetExtractionModifier" for each in modifiers[place + 1 :])
