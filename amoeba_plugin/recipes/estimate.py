"""How long the stages of a recipe will take on a model, before any weight is loaded: passes, and time on this machine.

An estimate: it knows the sizes of linears and the speed of a large matrix product, not attention over long sequences,
short matrices, or memory that runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from amoeba_plugin.data.calibration import LESS_DATA
from amoeba_plugin.elastic.subnet_config import weightless
from amoeba_plugin.modifiers import (
    AdaptiveLayerTuningModifier,
    DepthShrinkingModifier,
    LayerwisePolicyModifier,
    OneForAllDistillationModifier,
    WidthShrinkingModifier,
)
from amoeba_plugin.modifiers.selection import NO_REPAIR
from amoeba_plugin.recipes.plan import RecipePlan
from amoeba_plugin.runtime.machine_speed import flops_per_second
from amoeba_plugin.runtime.progress import in_words
from amoeba_plugin.selection.depth.dynamic_program import evaluations, exchange_evaluations
from amoeba_plugin.selection.depth.search import LAZY
from amoeba_plugin.selection.depth.steps import steps_per_layer
from amoeba_plugin.selection.importance import GroupImportance
from amoeba_plugin.selection.layerwise.exchanges import BITS_STEP, SPARSITY_STEP
from amoeba_plugin.selection.registry import importance_named
from amoeba_plugin.selection.repair.fold_table import LEAST_JUDGING
from amoeba_plugin.selection.repair.moments import held_out_count
from amoeba_plugin.selection.width.splits import MOST_SPLITS
from amoeba_plugin.training.layer_tuning.windows import windows_below

FORWARD_AND_BACKWARD = 3  # passes that a pass with gradients costs
# by selector, how many times as many subnets as the program's
SEARCHES = {"dynamic_program": 1, "greedy": 1, "lazy_greedy": LAZY, "auto": 2}
REPAIR_PASSES = 4  # that repairing a width costs: whole layers, second moments of both their parts, the narrow ones
# Layer-forwards that the lockstep search runs, of all that its subnets have: 0.33 at 32 layers to 20, 0.38 at 12 to 8.
SHARED = 0.4
USED = 0.4  # of the speed of a large matrix product: 0.23 to 0.41 by the demo's model on one busy CPU thread
# Passes of the other selectors; of those that plugins bring nothing is known.
SELECTOR_PASSES = {"block_influence": 1, "angular_distance": 1, "taylor": 3, "taylor_plus": 3, "magnitude": 0,
                   "magnitude_plus": 0, "last_layers": 0}  # fmt: skip
UNITS = 4  # of a layer
# Passes by sensitivity, of a number of layers and of options: of KL, a candidate runs half of the layers on average.
POLICY_PASSES: dict[str, Callable[[int, int], float]] = {
    "kl": lambda layers, options: UNITS * options * (layers + 1) / 2,
    "output_error": lambda layers, options: UNITS * options,
    "fisher": lambda layers, options: FORWARD_AND_BACKWARD,
}


@dataclass(frozen=True)
class StageCost:
    """What a stage costs.

    Attributes:
        stage: Its name, as in the progress bars.
        what: What is counted, for people.
        passes: Of the whole model over one sequence.
        length: Tokens of the sequence.
        shorter: What shortens it.
    """

    stage: str
    what: str
    passes: float
    length: int
    shorter: str


def stage_costs(plan: RecipePlan, config: PretrainedConfig, samples: int, length: int) -> list[StageCost]:
    """Return the stages that measure or train.

    Args:
        plan: Of the recipe.
        config: The whole model's.
        samples: Sequences of calibration data.
        length: Tokens of each.
    """
    costs: list[StageCost] = []
    if plan.depth is not None and plan.depth.kept_layers is None and plan.depth.questions is None:
        costs += _depth(plan.depth, config.num_hidden_layers, samples, length)
    if plan.width is not None:
        costs += _width(plan.width, samples, length)
    costs += _repairs(plan, config.num_hidden_layers, samples, length)
    if plan.policy is not None and not plan.policy.is_decided:
        costs += _policy(plan.policy, config.num_hidden_layers, samples, length)
    if plan.training is not None and plan.training.max_steps:
        costs.append(_training(plan.training, length))
    if plan.tuning is not None:
        costs.append(_tuning(plan.tuning, length, config.num_hidden_layers))
    return costs


def estimated(costs: list[StageCost], config: PretrainedConfig) -> list[str]:
    """Return a line for every stage, with its time on this machine."""
    model = weightless(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_word_embeddings:  # the input's are looked up, not multiplied by
        weights -= model.get_input_embeddings().get_parameter("weight").numel()
    speed = USED * flops_per_second()
    return [
        f"{cost.stage}: {cost.what}, about {in_words(2 * weights * cost.length * cost.passes / speed)} here; shorter "
        f"with {cost.shorter}"
        for cost in costs
    ]


def _depth(modifier: DepthShrinkingModifier, layers: int, samples: int, length: int) -> Iterator[StageCost]:
    used = samples if modifier.max_batches is None else min(samples, modifier.max_batches)
    shorter = f"{LESS_DATA} or max_batches"
    if modifier.selector in SEARCHES:
        if modifier.repair != NO_REPAIR and modifier.granularity == "layer":
            used = min(used, held_out_count(samples, LEAST_JUDGING))
        steps = steps_per_layer(modifier.granularity)
        candidates, most = steps * (layers - modifier.keep_last), steps * (layers - modifier.least_depth(layers))
        subnets = 1 + round(SEARCHES[modifier.selector] * evaluations(candidates, most, modifier.beam))
        subnets += exchange_evaluations(candidates, most, modifier.exchanges)
        what = f"{subnets:,} subnets on {used:,} sequences of {length} tokens"
        yield StageCost("depth search", what, SHARED * subnets * used, length, shorter)
        return
    passes = layers if modifier.selector == "one_shot" else SELECTOR_PASSES.get(modifier.selector)
    if passes:
        what = f"{passes} passes over {used:,} sequences of {length} tokens"
        yield StageCost(f"selector {modifier.selector}", what, passes * used, length, shorter)


def _width(modifier: WidthShrinkingModifier, samples: int, length: int) -> Iterator[StageCost]:
    importance = importance_named(modifier.importance)
    passes = 1
    if isinstance(importance, GroupImportance):
        passes = FORWARD_AND_BACKWARD if importance.needs_gradients else 0
    splits = MOST_SPLITS * modifier.reduced if modifier.allocation == "measured" else 0
    if passes or splits:
        judging = modifier.judging(samples)
        said = {0: "weights alone", 1: f"a pass over {samples:,} sequences"}
        what = said.get(passes, f"{passes} passes over {samples:,} sequences") + f" of {length} tokens" * (passes > 0)
        what += f", at most {splits} splits on {judging:,} sequences of {length}" if splits else ""
        shorter = f"{LESS_DATA}, or allocation: uniform"
        yield StageCost("width ranking", what, passes * samples + splits * judging, length, shorter)


def _repairs(plan: RecipePlan, layers: int, samples: int, length: int) -> Iterator[StageCost]:
    if plan.depth is not None and plan.depth.repair != NO_REPAIR:
        every = range(plan.depth.least_depth(layers), layers)
        depths = len(every if plan.depth.depths is None else set(plan.depth.depths) - {layers})
        what = f"{depths} depths, at most 2 passes each over {samples:,} sequences of {length} tokens"
        yield StageCost("depth repair", what, 2 * depths * samples, length, f"{LESS_DATA}, or repair: none")
    if plan.width is not None and plan.width.repair != NO_REPAIR and plan.width.reduced:
        passes = REPAIR_PASSES * plan.width.reduced
        what = f"{passes} passes over {samples:,} sequences of {length} tokens"
        yield StageCost("repair", what, passes * samples, length, f"{LESS_DATA}, fewer widths, or repair: none")


def _policy(modifier: LayerwisePolicyModifier, layers: int, samples: int, length: int) -> Iterator[StageCost]:
    """Yield what scoring takes at most, of a whole model; of sensitivities that plugins bring nothing is known."""
    used = samples if modifier.max_batches is None else min(samples, modifier.max_batches)
    options, known = len(modifier.budget(None).lone), POLICY_PASSES.get(modifier.sensitivity)
    if known is not None:
        passes = known(layers, options) + _exchange_passes(modifier)
        what = f"about {passes:.0f} passes over {used:,} sequences of {length} tokens"
        yield StageCost("layer-wise policy", what, passes * used, length, f"{LESS_DATA}, max_batches or fewer options")


def _exchange_passes(modifier: LayerwisePolicyModifier) -> float:
    """Return how many choices are measured at most, on the way to the average."""
    if not modifier.exchanges or modifier.allocation != "knapsack":
        return 1
    if modifier.average_bits is None:
        way = (max(modifier.sparsities) - modifier.average_sparsity) / SPARSITY_STEP
    else:
        way = (modifier.average_bits - min(modifier.bits)) / BITS_STEP
    return (1 + max(way, 0)) * (1 + modifier.exchanges)


def _tuning(modifier: AdaptiveLayerTuningModifier, length: int, layers: int) -> StageCost:
    sequences = modifier.max_steps * modifier.gradient_accumulation_steps * modifier.batch_size
    tokens = length if modifier.dataset is None else modifier.max_seq_length
    windows = windows_below(modifier.exits.of(layers), modifier.window, apart=not modifier.is_stacked)
    weights = modifier.weights or [1.0] * len(windows)
    run = [each.first + FORWARD_AND_BACKWARD * (each.depth - each.first) for each in windows]
    share = sum(weight * each for weight, each in zip(weights, run, strict=True)) / sum(weights) / layers
    what = f"{modifier.max_steps:,} steps, {sequences:,} sequences of {tokens} tokens up to {len(windows)} exits"
    shorter = "max_steps, gradient_accumulation_steps, batch_size or a smaller window"
    return StageCost("layer tuning", what, share * sequences, tokens, shorter)


def _training(modifier: OneForAllDistillationModifier, length: int) -> StageCost:
    sequences = modifier.max_steps * modifier.gradient_accumulation_steps * modifier.batch_size
    subnets = 2 + modifier.num_random
    tokens = length if modifier.dataset is None else modifier.max_seq_length
    what = f"{modifier.max_steps:,} steps, {sequences:,} sequences of {tokens} tokens through {subnets} subnets each"
    shorter = "max_steps, gradient_accumulation_steps, batch_size or num_random"
    return StageCost("one-for-all training", what, FORWARD_AND_BACKWARD * subnets * sequences, tokens, shorter)
