"""The search for a layer-wise policy: sensitivities, an allocation within the averages, exchanges that are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.errors import ArchitectureError, BudgetError, DataError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.runtime.module_calls import is_offloaded
from amoeba_plugin.runtime.ranks import sum_over_ranks
from amoeba_plugin.selection.layer_runs import LayerRuns
from amoeba_plugin.selection.layerwise.allocation import Allocation, knapsack, sparsity_by_mean, twice_above_mean
from amoeba_plugin.selection.layerwise.compress import Compressor, input_norms
from amoeba_plugin.selection.layerwise.exchanges import Choice, climb
from amoeba_plugin.selection.layerwise.options import (
    MOST_SPARSE,
    SPARSITIES,
    WHOLE,
    Grid,
    Option,
    counted_sparsity,
    require_bits,
    require_divided,
    require_sparsities,
    sparsity_of,
)
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy, UnitPolicy, option_name
from amoeba_plugin.selection.layerwise.task import DenseStates, Scores, Sensitivity, SensitivityTask, divergence
from amoeba_plugin.selection.layerwise.units import Unit, layer_units

Rule = Literal["knapsack", "mean"]


@dataclass(frozen=True)
class PolicyBudget:
    """What a policy may take, and of which options it is made.

    Attributes:
        average_bits: The most bits per weight, scales and zero points counted; ``None``: nothing is quantized.
        average_sparsity: The least share of zeros; 0: nothing is pruned.
        bits: That weights may have.
        sparsities: That units may have.
        rule: ``knapsack``: least total score within the averages; ``mean``: the paper's.
        exchanges: Tried by measuring, at every budget on the way (``knapsack``).
        group_size: Inputs that share a scale; -1: all of a row; ``None``: the largest of 128, 64 and 32 that fits.
        symmetric: Without zero points.
    """

    average_bits: float | None = None
    average_sparsity: float = 0.0
    bits: tuple[int, ...] = (4, 8, 16)
    sparsities: tuple[float, ...] = SPARSITIES
    rule: Rule = "knapsack"
    exchanges: int = 4
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.average_bits is None and not self.average_sparsity:
            raise RecipeError("a layer-wise policy wants average_bits, average_sparsity, or both; give one of them")
        if not 0 <= self.average_sparsity <= MOST_SPARSE:
            raise BudgetError(
                f"average sparsity {self.average_sparsity:g} is out of reach: units have shares from 0 to "
                f"{MOST_SPARSE}; the nearest is {min(max(self.average_sparsity, 0), MOST_SPARSE):g}"
            )
        bits = require_bits(self.bits)
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "sparsities", require_sparsities(self.sparsities))
        if self.rule == "mean" and self.average_bits is not None and 2 * bits[0] not in bits:
            raise RecipeError(
                f"the paper's rule gives {bits[0]} bits or twice as many, and {2 * bits[0]} is none of the bits "
                f"{', '.join(map(str, bits))}; add it, or take the knapsack"
            )

    @property
    def options(self) -> list[Option]:
        """What a unit may be: every bits with every sparsity."""
        bits = self.bits if self.average_bits is not None else (WHOLE,)
        sparsities = self.sparsities if self.average_sparsity else (0.0,)
        return [Option(each, sparsity) for each in bits for sparsity in sparsities]

    @property
    def lone(self) -> list[Option]:
        """Options that do one thing alone, which are scored; what a pair loses is the sum."""
        found = [part for option in self.options for part in parts_of(option)]
        return list(dict.fromkeys(found))

    def grid(self, units: Sequence[Unit]) -> Grid:
        """Return what the weights of units are rounded to.

        Raises:
            RecipeError: If groups do not divide a unit's inputs.
        """
        if self.group_size is None:
            return Grid.fitting(units, self.symmetric)
        grid = Grid(self.group_size, self.symmetric)
        require_divided(grid, units)
        return grid

    def allocation(self, units: Sequence[Unit], scores: Scores | None = None) -> Allocation:
        """Return what is to be allocated; of no scores, to see what is in reach."""
        grid, options = self.grid(units), self.options
        return Allocation(
            np.array([unit.weights for unit in units], dtype=float),
            np.array([[_score(scores, unit, option) for option in options] for unit in units]),
            np.array([[grid.counted(option.bits, unit) for option in options] for unit in units]),
            np.array([[counted_sparsity(option, unit) for option in options] for unit in units]),
            self.average_bits,
            self.average_sparsity,
        )

    def require_reachable(self, units: Sequence[Unit]) -> None:
        """Refuse averages that no policy of units has; no weights are needed.

        Raises:
            BudgetError: With the nearest.
            RecipeError: If groups do not fit.
        """
        self.allocation(units).require_reachable()


def parts_of(option: Option) -> list[Option]:
    """Return the lone options that an option is made of."""
    bits = [Option(option.bits)] if option.bits != WHOLE else []
    return bits + ([Option(WHOLE, option.sparsity)] if option.sparsity else [])


def find_policy(
    model: PreTrainedModel,
    adapter: ArchitectureAdapter,
    batches: Sequence[Batch],
    sensitivity: Sensitivity,
    budget: PolicyBudget,
    units: Sequence[Unit] | None = None,
) -> LayerwisePolicy:
    """Score the units of a dense model and give each an option within a budget.

    Args:
        model: In full precision; left as it is.
        adapter: Its architecture.
        batches: Calibration data from ``materialise``; ranks that were given the same share it out.
        sensitivity: That scores units.
        budget: Averages and options.
        units: That are decided on, and averaged over; default: all.

    Raises:
        ArchitectureError: If its layers cannot be run one at a time, or weights are packed or offloaded.
        BudgetError: If the averages are out of reach.
        DataError: If a score is NaN or infinite.
    """
    if is_offloaded(model):
        raise ArchitectureError(
            "a layer-wise policy exchanges weights to measure them, and accelerate offloads some of this model's; load "
            "it without device_map where memory holds it whole"
        )
    units = layer_units(model, adapter) if units is None else units
    budget.require_reachable(units)
    norms = input_norms(model, units, batches) if budget.average_sparsity else {}
    compressor = Compressor(model, budget.grid(units), norms)
    with DenseStates.of(LayerRuns.of(model, adapter, batches)) as dense:
        task = SensitivityTask(dense, batches, units, budget.lone, compressor)
        scores = sensitivity.measure(task)
        _require_finite(scores, sensitivity.name)
        chosen, lost = chosen_options(task, budget, scores)
    policy = LayerwisePolicy(
        fingerprint=model_fingerprint(model, adapter),
        sensitivity=sensitivity.name,
        allocation=budget.rule,
        group_size=compressor.grid.group_size,
        symmetric=compressor.grid.symmetric,
        divergence=lost,
        units=described(chosen, scores),
    )
    policy.require_within(budget.average_bits, budget.average_sparsity)
    return policy


def described(chosen: dict[Unit, Option], scores: Scores) -> dict[str, UnitPolicy]:
    """Return what units get, as a policy has it."""
    by_unit: dict[str, dict[str, float]] = {}
    for (name, option), score in scores.items():
        by_unit.setdefault(name, {})[option_name(option)] = score
    return {
        unit.name: UnitPolicy(
            modules=list(unit.modules), rows=unit.rows, columns=unit.columns, bits=option.bits,
            sparsity=option.sparsity, scores=by_unit.get(unit.name, {}),
        )
        for unit, option in chosen.items()
    }  # fmt: skip


def chosen_options(task: SensitivityTask, budget: PolicyBudget, scores: Scores) -> tuple[dict[Unit, Option], float]:
    """Return what every unit gets of scores, and the divergence that was measured of all together."""
    options, allocation = budget.options, budget.allocation(task.units, scores)

    def at(choice: Iterable[int]) -> dict[Unit, Option]:
        return dict(zip(task.units, (options[each] for each in choice), strict=True))

    def measure(choice: Choice) -> float:
        return measured_divergence(task, at(choice))

    if budget.rule == "mean":
        by_rule = by_mean(task.units, scores, budget)
        return by_rule, measured_divergence(task, by_rule)
    if not budget.exchanges:
        found = tuple(knapsack(allocation))
        return at(found), measure(found)
    best, lost = climb(allocation, measure, budget.exchanges)
    return at(best), lost


def measured_divergence(task: SensitivityTask, chosen: dict[Unit, Option]) -> float:
    """Return the KL divergence of the model with all units at their options from the dense one, nats per token."""
    total = 0.0
    with task.compressor.at(chosen):
        for batch in range(len(task.dense.batches)):
            dense = task.dense.dense_log_probabilities(batch)
            total += divergence(dense, dense.exp(), task.dense.model_log_probabilities(batch))
    return float(sum_over_ranks(torch.tensor(total, dtype=torch.float64))) / task.token_count()


def by_mean(units: Sequence[Unit], scores: Scores, budget: PolicyBudget) -> dict[Unit, Option]:
    """Return the options that units get by the paper's rules.

    Raises:
        BudgetError: If that takes more bits than the average asked for; the rule knows no budget.
    """
    bits = [WHOLE] * len(units)
    if budget.average_bits is not None:
        base = budget.bits[0]
        doubled = twice_above_mean([scores[unit.name, Option(base)] for unit in units])
        bits = [2 * base if each else base for each in doubled]
    sparsities = [0.0] * len(units)
    if budget.average_sparsity:
        lone = [option for option in budget.lone if option.sparsity]
        means = [sum(scores[unit.name, option] for option in lone) / len(lone) for unit in units]
        weights = [unit.weights for unit in units]
        found = sparsity_by_mean(means, weights, budget.average_sparsity, MOST_SPARSE)
        sparsities = [sparsity_of(unit.columns, each) for unit, each in zip(units, found, strict=True)]
    grid = budget.grid(units)
    total = sum(unit.weights for unit in units)
    achieved = sum(unit.weights * grid.counted(each, unit) for unit, each in zip(units, bits, strict=True)) / total
    if budget.average_bits is not None and achieved > budget.average_bits + 1e-9:
        raise BudgetError(
            f"the rule of the mean gives this model {achieved:.4g} bits per weight, and {budget.average_bits:g} were "
            f"asked for; the nearest is {achieved:.4g}, or take the knapsack"
        )
    return {unit: Option(each, zeros) for unit, each, zeros in zip(units, bits, sparsities, strict=True)}


def _require_finite(scores: Scores, name: str) -> None:
    wrong = next((unit for (unit, _), score in scores.items() if not math.isfinite(score)), None)
    if wrong is not None:
        raise DataError(
            f"sensitivity {name} of {wrong} is NaN or infinite; check the weights, load them in bfloat16 or float32 "
            "instead of float16, and look at the calibration data"
        )


def _score(scores: Scores | None, unit: Unit, option: Option) -> float:
    return 0.0 if scores is None else sum(scores[unit.name, part] for part in parts_of(option))
