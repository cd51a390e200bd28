"""LayerwisePolicyModifier: which bits and which sparsity every layer gets, for the host's modifiers behind it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import Field, field_validator, model_validator
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.data.calibration import materialise
from amoeba_plugin.errors import ArtifactError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.fingerprint import model_fingerprint, same_model
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.modifiers.order import require_session_order
from amoeba_plugin.modifiers.policy_hosts import PolicyHosts
from amoeba_plugin.modifiers.selection import on_main_device
from amoeba_plugin.selection.layerwise.options import SPARSITIES, Grid
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy, UnitPolicy
from amoeba_plugin.selection.layerwise.search import PolicyBudget, find_policy
from amoeba_plugin.selection.layerwise.units import Unit, layer_units
from amoeba_plugin.selection.registry import sensitivity_named

logger = logging.getLogger(__name__)


class LayerwisePolicyModifier(Modifier):
    """Choose bits and sparsity of every unit (q/k/v, o, gate/up, down of a layer) for the modifiers behind it.

    Sample YAML::

        policy_stage:
          amoeba_policy_modifiers:
            LayerwisePolicyModifier: {average_bits: 4.5}
        quantize_stage:
          quantization_modifiers:
            GPTQModifier: {ignore: [lm_head]}

    Attributes:
        average_bits: The most bits per weight of the decoder layers' linears, scales and zero points counted, for
            ``GPTQModifier`` or ``QuantizationModifier`` behind it. Default: nothing is chosen for them.
        average_sparsity: The least share of zeros, for ``SparseGPTModifier`` or ``WandaPruningModifier`` behind
            it; from 0 to 0.7. Zeros without a pattern make nothing faster. Default 0: nothing is chosen for them.
        bits: That a weight may have: 4 and 8; 16, not quantized; 2 and 3, which transformers alone reads. Default
            ``[4, 8, 16]``.
        sparsities: That a unit may have. Default ``[0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]``.
        sensitivity: What a unit loses by an option: ``kl`` (divergence of the model's output with that unit alone
            compressed), ``output_error`` (of its layer), ``fisher`` (by gradients), or a plugin's. Default ``kl``.
        allocation: ``knapsack`` (what loses least within the averages), or ``mean`` (Edge-LLM's rule: twice the least
            bits for units more sensitive than the mean; less sparsity for more sensitive ones). Default ``knapsack``.
        exchanges: With ``knapsack``: exchanges of options between units that are tried by measuring, at every quarter
            of a bit on the way to the budget; 0: what the scores say is taken. Default 4.
        max_batches: Calibration batches that are measured on. Default: all.
        policy: A file that ``amoeba policy --data`` wrote: nothing is measured. Default: none.
        choices: Of every unit bits and sparsity: nothing is measured. Filled in by the search, so that the recipe
            written beside a checkpoint repeats it.
    """

    average_bits: float | None = Field(default=None, gt=0)
    average_sparsity: float = 0.0
    bits: list[int] = Field(default_factory=lambda: [4, 8, 16])
    sparsities: list[float] = Field(default_factory=lambda: list(SPARSITIES))
    sensitivity: str = "kl"
    allocation: Literal["knapsack", "mean"] = "knapsack"
    exchanges: int = Field(default=4, ge=0)
    max_batches: int | None = Field(default=None, ge=1)
    policy: str | None = None
    choices: dict[str, list[float]] | None = None

    @field_validator("sensitivity")
    @classmethod
    def _sensitivity_exists(cls, name: str) -> str:
        sensitivity_named(name)
        return name

    @field_validator("choices")
    @classmethod
    def _choices_are_pairs(cls, choices: dict[str, list[float]] | None) -> dict[str, list[float]] | None:
        for name, pair in (choices or {}).items():
            if len(pair) != 2:
                raise RecipeError(f"choices of {name} are {pair}; give bits and sparsity: [4, 0.0]")
            PolicyBudget(average_bits=1, average_sparsity=pair[1], bits=(4, int(pair[0])))
        return choices

    @model_validator(mode="after")
    def _budget_is_possible(self) -> LayerwisePolicyModifier:
        if self.policy is not None and self.choices is not None:
            raise RecipeError("policy and choices both say what units get; give one of them")
        self.budget(None)
        return self

    @property
    def is_decided(self) -> bool:
        """Whether nothing is left to measure."""
        return self.policy is not None or self.choices is not None

    def budget(self, grid: Grid | None) -> PolicyBudget:
        """Return what the fields ask for.

        Args:
            grid: That the quantizer behind it has; ``None``: the largest groups that fit the model.
        """
        return PolicyBudget(
            self.average_bits, self.average_sparsity, tuple(self.bits), tuple(self.sparsities), self.allocation,
            self.exchanges, None if grid is None else grid.group_size, grid is None or grid.symmetric,
        )  # fmt: skip

    def hosts(self, modifiers: list[Modifier]) -> PolicyHosts:
        """Return the modifiers of a recipe that are filled."""
        return PolicyHosts.behind(self, modifiers, self.average_bits is not None, self.average_sparsity > 0)

    def require_fits(self, modifiers: list[Modifier], model: PreTrainedModel, adapter: ArchitectureAdapter) -> None:
        """Refuse what does not fit a model; no weights are needed.

        Raises:
            ArchitectureError: If the model has no units to choose for.
            ArtifactError: If the policy or the choices are of another model.
            BudgetError: If the averages are out of reach.
            RecipeError: If modifiers behind it leave nothing to choose.
        """
        hosts = self.hosts(modifiers)
        units = hosts.decided(layer_units(model, adapter), model)
        if self.is_decided:
            self._decided(units, self.budget(hosts.grid))
        else:
            self.budget(hosts.grid).require_reachable(units)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Measure, choose, and fill the modifiers behind."""
        require_session_order(self)
        model, adapter = state.model, architecture_of(state.model.config)
        hosts = self.hosts(active_session().lifecycle.recipe.modifiers)
        units = hosts.decided(layer_units(model, adapter), model)
        budget = self.budget(hosts.grid)
        if self.is_decided:
            found = self._decided(units, budget)
            _require_same_weights(found, model, adapter)
        else:
            budget.require_reachable(units)
            batches = materialise(state.data.calib, vocab_size=model.config.vocab_size)[: self.max_batches]
            with on_main_device(model):
                found = find_policy(model, adapter, batches, sensitivity_named(self.sensitivity), budget, units)
        self.choices = {name: [each.bits, each.sparsity] for name, each in found.units.items()}
        self.policy = None
        hosts.fill(found, model)
        logger.info("layer-wise policy: %s", found.in_words)
        for note in found.notes:
            logger.warning(note)
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Do nothing: the modifiers behind have done it all."""
        return True

    def _decided(self, units: list[Unit], budget: PolicyBudget) -> LayerwisePolicy:
        if self.policy is not None:
            found = LayerwisePolicy.load(Path(self.policy))
            found.require_of(units, self.policy)
            return found
        choices = self.choices or {}
        if set(choices) != {unit.name for unit in units}:
            other = sorted(set(choices) ^ {unit.name for unit in units})
            raise ArtifactError(
                f"choices are of another model: they have {len(choices)} units and the model {len(units)}, and differ "
                f"in {', '.join(other[:3])}; leave choices out, so that they are made anew"
            )
        grid = budget.grid(units)
        parts = {
            unit.name: UnitPolicy(
                modules=list(unit.modules), rows=unit.rows, columns=unit.columns, bits=int(choices[unit.name][0]),
                sparsity=choices[unit.name][1],
            )
            for unit in units
        }  # fmt: skip
        return LayerwisePolicy(
            sensitivity=self.sensitivity, allocation=self.allocation, group_size=grid.group_size,
            symmetric=grid.symmetric, units=parts,
        )  # fmt: skip


def _require_same_weights(policy: LayerwisePolicy, model: nn.Module, adapter: ArchitectureAdapter) -> None:
    if policy.fingerprint is None or not isinstance(model, PreTrainedModel):
        return
    if not same_model(policy.fingerprint, model_fingerprint(model, adapter)):
        raise ArtifactError(
            "the policy is of a model of the same sizes and other weights; make one of this model (amoeba policy "
            "MODEL), or give average_bits in place of policy"
        )
