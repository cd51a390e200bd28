"""What a recipe and a model's configuration tell together, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from amoeba_plugin.errors import ArchitectureError, RecipeError
from amoeba_plugin.models.adapter import ArchitectureAdapter, require_alike_layers
from amoeba_plugin.models.registry import architecture_for


@dataclass(frozen=True)
class ModelPlan:
    """A recipe that fits a model.

    Attributes:
        config: The whole model's.
        adapter: Its architecture; ``None`` where nobody registered it, and the recipe only quantizes.
        subnet: The configuration that quantization will see: the subnet's where one is extracted, else the model's.
            Where the selection decides the sizes, it has a layer of the least that any may keep, and whole ones.
        needs_own_stage: Whether ``oneshot`` would exchange modules of the model, so that structure must change before.
    """

    config: PretrainedConfig
    adapter: ArchitectureAdapter | None
    subnet: PretrainedConfig
    needs_own_stage: bool

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts that its adapter knows of; its subnets then are, too."""
        groups = () if self.adapter is None else self.adapter.channel_groups(self.config)
        return any(group.consumer.expert is not None for group in groups)


def known_architecture(config: PretrainedConfig) -> ArchitectureAdapter | None:
    """Return the architecture of a model, or ``None`` where nobody registered it."""
    try:
        return architecture_for(config.model_type)
    except ArchitectureError:
        return None


def require_full_precision(config: PretrainedConfig) -> None:
    """Refuse a model that is a subnet with layers of its own sizes already, or quantized.

    Raises:
        ArchitectureError: Saying what to give instead.
    """
    require_alike_layers(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ArchitectureError(
            "the model is already quantized (config.quantization_config), and everything here works on full-precision "
            "weights; give the original model"
        )


def require_linears(names: Collection[str], model: PreTrainedModel) -> None:
    """Refuse names that no linear has: PEFT passes over them where others fit, and complains after selection else.

    Args:
        names: The ends of paths of modules.
        model: Needs no weights.

    Raises:
        RecipeError: With the names there are.
    """
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    unknown = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in linears)]
    if unknown:
        possible = dict.fromkeys(path.rpartition(".")[2] for path in linears)
        raise RecipeError(
            f"adapter.target_modules names {', '.join(unknown)}, and the model has no such linear; possible are "
            f"{', '.join(possible)}"
        )
