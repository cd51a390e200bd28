"""The host's own modifiers that a layer-wise policy fills: which of a recipe's they are, and what they are told.

A policy decides *which* bits and zeros; *how* they come about stays the business of ``GPTQModifier``,
``QuantizationModifier``, ``SparseGPTModifier`` and ``WandaPruningModifier``, whose fields are filled before they begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils import is_match
from llmcompressor.modifiers import Modifier
from torch import nn

from amoeba_plugin.errors import RecipeError
from amoeba_plugin.selection.layerwise.options import WHOLE, Grid
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy
from amoeba_plugin.selection.layerwise.units import Unit, modules_in_order

QUANTIZERS = ("GPTQModifier", "QuantizationModifier")
PRUNERS = ("SparseGPTModifier", "WandaPruningModifier")
ANY_PATTERN = "0:0"  # of zeros
EVERYWHERE = ["Linear"]  # the host's default of targets


@dataclass(frozen=True)
class PolicyHosts:
    """The modifiers behind a policy that it fills.

    Attributes:
        quantizer: Gets schemes; ``None``: nothing is quantized by the policy.
        pruner: Gets sparsities; ``None``: nothing is pruned by it.
    """

    quantizer: Any = None
    pruner: Any = None

    @classmethod
    def behind(cls, policy: Modifier, modifiers: Sequence[Modifier], quantizes: bool, prunes: bool) -> PolicyHosts:
        """Return those of a recipe.

        Args:
            policy: The policy's own modifier.
            modifiers: Of the recipe, in order.
            quantizes: Whether the policy chooses bits.
            prunes: Whether it chooses sparsities.

        Raises:
            RecipeError: If there are none, several, or their order or fields leave the policy nothing to choose.
        """
        place = next((place for place, each in enumerate(modifiers) if each is policy), -1)
        behind = list(modifiers[place + 1 :])
        quantizer = _the_one(behind, QUANTIZERS, "average_bits", quantizes)
        pruner = _the_one(behind, PRUNERS, "average_sparsity", prunes)
        if quantizer is not None and pruner is not None and behind.index(pruner) > behind.index(quantizer):
            raise RecipeError(
                f"{type(pruner).__name__} stands behind {type(quantizer).__name__}, and would prune what is rounded "
                "already; put it before"
            )
        if pruner is not None and (pruner.mask_structure != ANY_PATTERN or pruner.sparsity_profile is not None):
            raise RecipeError(
                f"{type(pruner).__name__} has a mask_structure or a sparsity_profile, and LayerwisePolicyModifier "
                "chooses a sparsity for every unit, without a pattern; leave these fields out"
            )
        return cls(quantizer, pruner)

    def decided(self, units: Sequence[Unit], model: nn.Module) -> list[Unit]:
        """Return the units that are decided on: those that no modifier ignores.

        Args:
            units: Of the model.
            model: Needs no weights.

        Raises:
            RecipeError: If none is left.
        """
        ignored = [name for host in (self.quantizer, self.pruner) if host is not None for name in host.ignore]
        found = [
            unit
            for unit in units
            if not any(is_match(path, model.get_submodule(path), ignored) for path in unit.modules)
        ]
        if not found:
            raise RecipeError(
                f"ignore: {', '.join(ignored)} leaves LayerwisePolicyModifier no linear to decide on; ignore less"
            )
        return found

    @property
    def scheme(self) -> QuantizationScheme | None:
        """The scheme that the recipe gives the quantizer, of which the policy changes the bits; ``None``: none.

        Raises:
            RecipeError: If there are several that differ in more than bits, or they are not of integers by group or
                channel.
        """
        if self.quantizer is None or (self.quantizer.scheme is None and not self.quantizer.config_groups):
            return None
        name = type(self.quantizer).__name__
        schemes = list(self.quantizer.resolve_quantization_config().config_groups.values())
        if any(_but_bits(each) != _but_bits(schemes[0]) for each in schemes):
            raise RecipeError(
                f"{name} has {len(schemes)} schemes that differ in more than bits, and LayerwisePolicyModifier chooses "
                "what is quantized how; give it one scheme, or none"
            )
        weights = schemes[0].weights
        if weights is None or weights.type != "int" or weights.strategy not in ("group", "channel"):
            raise RecipeError(
                f"the scheme of {name} does not round weights to integers with scales by group or channel, of which "
                "LayerwisePolicyModifier could choose the bits; take W4A16 or W8A8, or give it no scheme"
            )
        found: QuantizationScheme = schemes[0]
        return found

    @property
    def grid(self) -> Grid | None:
        """Of the scheme that the recipe gives; ``None``: it gives none."""
        weights = None if self.scheme is None else self.scheme.weights
        return None if weights is None else Grid(weights.group_size or -1, bool(weights.symmetric))

    def fill(self, policy: LayerwisePolicy, model: nn.Module) -> None:
        """Tell the modifiers what the policy decided; they have not begun yet."""
        if self.quantizer is not None:
            groups = scheme_groups(policy, model, self.scheme)
            self.quantizer.config_groups = {
                name: QuantizationScheme.model_validate(fields) for name, fields in groups.items()
            }
            self.quantizer.scheme, self.quantizer.targets = None, list(EVERYWHERE)
            self.quantizer._resolved_config = None
        if self.pruner is not None:
            fields = pruning_fields(policy, model)
            self.pruner.sparsity, self.pruner.targets = fields["sparsity"], fields["targets"]


def scheme_groups(
    policy: LayerwisePolicy, model: nn.Module, scheme: QuantizationScheme | None = None
) -> dict[str, dict[str, Any]]:
    """Return ``config_groups``: one scheme for all modules of the same bits, by their full names.

    Args:
        policy: Of the model.
        model: Needs no weights.
        scheme: Whose other fields stay, such as quantized activations.
    """
    units = [(each.unit(name), each.bits) for name, each in policy.units.items()]
    given: dict[str, Any] = (
        {} if scheme is None else scheme.model_dump(exclude_unset=True, exclude={"targets", "format"})
    )
    groups = {}
    for bits in sorted({bits for _, bits in units if bits != WHOLE}):
        weights = {**(given.get("weights") or {}), **policy.grid.fields(bits)}
        targets = modules_in_order([unit for unit, each in units if each == bits], model)
        groups[f"bits_{bits}"] = {**given, "targets": targets, "weights": weights}
    return groups


def pruning_fields(policy: LayerwisePolicy, model: nn.Module) -> dict[str, Any]:
    """Return ``targets`` and ``sparsity``: modules by their full names, and of each its own share, in the model's
    order.

    Args:
        policy: Of the model.
        model: Needs no weights.
    """
    units = {each.unit(name): each.sparsity for name, each in policy.units.items() if each.sparsity}
    shares = {path: sparsity for unit, sparsity in units.items() for path in unit.modules}
    targets = modules_in_order(list(units), model)
    return {"sparsity": [shares[path] for path in targets], "targets": targets}


def _but_bits(scheme: QuantizationScheme) -> dict[str, Any]:
    fields: dict[str, Any] = scheme.model_dump(exclude={"targets", "format"})
    return fields | {"weights": {**(fields["weights"] or {}), "num_bits": None}}


def _the_one(behind: Sequence[Modifier], kinds: Sequence[str], field: str, wanted: bool) -> Any:
    found = [each for each in behind if type(each).__name__ in kinds]
    if not wanted:  # what stands there keeps its own fields
        return None
    if len(found) != 1:
        raise RecipeError(
            f"{field} wants one modifier behind LayerwisePolicyModifier that it can fill, {' or '.join(kinds)}, and "
            f"there are {len(found)}; add one, or leave {field} out"
        )
    return found[0]
