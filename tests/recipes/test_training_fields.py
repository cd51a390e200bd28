"""Fields of the training modifier that cannot work, or do nothing: refused with the recipe, before anything loads."""

from __future__ import annotations

import pytest

from amoeba_plugin.errors import ShapeError
from amoeba_plugin.modifiers import OneForAllDistillationModifier
from amoeba_plugin.recipes.read import plan_recipe
from support.recipes import GOOD, config_of, refusal

# What stands in place of "max_steps: 2", and what the message says.
BAD = {
    "incomplete schedule": ("lr_scheduler_type: cosine_with_min_lr", ["'cosine_with_min_lr' is not possible"]),
    "schedule of an evaluation": ("lr_scheduler_type: reduce_lr_on_plateau", ["is not possible", "cosine"]),
    "no warm-up": ("warmup_steps: 5", ["warmup_steps 5 does nothing", "constant_with_warmup"]),
    "sampled shape that is none": ("sampled_shapes: [3x1, wide]", ["'wide' is not a subnet shape"]),
    "sampled shape too shallow": ("sampled_shapes: [1x1]", ["shape 1x1", "min_depth 2"]),
    "sampled shape of another width": ("sampled_shapes: [3x1/2]", ["shape 3x1/2", "1, 3/4"]),
    "sampled shapes in a word": ("sampled_shapes: every", ["sampled_shapes", "'every'", "'all'"]),
    "sampled shapes of no draw": (
        "sampled_shapes: [3x1], num_random: 0",
        ["sampled_shapes does nothing with num_random: 0"],
    ),
    "num_random below 0": ("num_random: -1", ["num_random", "greater than or equal to 0"]),
    "kd_weight above 1": ("kd_weight: 1.5", ["kd_weight", "1.5", "less than or equal to 1"]),
    "kd_weight NaN": ("kd_weight: .nan", [".nan", "quote it"]),
    "distill_steps below 0": ("distill_steps: -1", ["distill_steps", "greater than or equal to 0"]),
    "infinite temperature": ("temperature: 1.0e+999", ["1.0e+999", "quote it"]),
    "temperature 0": ("temperature: 0", ["temperature", "greater than 0"]),
    "ratio without balancing": ("max_balance_ratio: 5, loss_balancing: false", ["max_balance_ratio does nothing with"]),
    "ratio 0": ("max_balance_ratio: 0", ["max_balance_ratio", "greater than 0"]),
    "conflict_every below 0": ("conflict_every: -1", ["conflict_every"]),
    "samples of no dataset": ("num_samples: 5", ["num_samples does nothing without dataset"]),
    "saves to nowhere": ("save_steps: 5", ["save_steps does nothing without checkpoint_dir"]),
    "infinite learning rate": ("learning_rate: .inf", [".inf", "quote it"]),
    "seed below 0": ("seed: -1", ["seed", "greater than or equal to 0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_in_words(case: str):
    fields, words = BAD[case]
    message = refusal(GOOD.replace("max_steps: 2", fields, 1))
    for word in words:
        assert word in message


def test_oneshot_refuses_it_too():
    """It makes the modifier without our check of the recipe."""
    with pytest.raises(ValueError, match=r"lr_scheduler_type 'cosin' is not possible\. Did you mean 'cosine'\?"):
        OneForAllDistillationModifier(lr_scheduler_type="cosin")
    with pytest.raises(ValueError, match="loss 'mse' is unknown"):
        OneForAllDistillationModifier(loss="mse")


@pytest.mark.parametrize(("kept", "shape"), [("", "5x1"), ('{"2": [0, 3]}', "3x3/4"), ('{"2": [0, 3]}', "2.5x1")])
def test_sampled_shapes_must_be_the_models_too(kept: str, shape: str):
    given = f"min_depth: 2, kept_layers: {kept}" if kept else "min_depth: 2"
    text = GOOD.replace("min_depth: 2", given).replace("max_steps: 2", f"sampled_shapes: [{shape}]")
    with pytest.raises(ShapeError, match=f"shape {shape} is outside the space"):
        plan_recipe(text.replace("{shape: 3x3/4}", "{shape: 2x3/4}")).against(config_of())
