"""One plain LoRA for all shapes of an elastic model: PEFT's own, its factors sliced as the linears beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from amoeba_plugin.elastic.linear import ElasticLinear
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import AdapterError
from amoeba_plugin.models.compressed_linear import CompressedLinear
from amoeba_plugin.models.partial_linear import NOT_MERGED, PartialLinear
from amoeba_plugin.shape import SubnetShape


def attach_lora(elastic: ElasticModel, config: LoraConfig) -> PeftModel:
    """Put a LoRA on an elastic model that computes with the active sizes; the same update serves every shape.

    Args:
        elastic: Its linears may be at any shape.
        config: Of an ordinary LoRA on linear layers.

    Raises:
        AdapterError: If a variant of LoRA is asked for that looks at the whole weight, or compressed-tensors keeps the
            model's weights packed.
    """
    if any(isinstance(module, CompressedLinear) for module in elastic.model.modules()):
        raise AdapterError(
            "PEFT has no LoRA beside weights that compressed-tensors keeps packed; take SMOL, with num_experts=1 and "
            "top_k=1 for one LoRA: attach_smol(elastic, SmolConfig(...))"
        )
    peft_model = get_peft_model(elastic.model, config)
    assert isinstance(peft_model, PeftModel)
    follow_lora(elastic, peft_model)
    return peft_model


def follow_lora(elastic: ElasticModel, peft_model: PeftModel) -> None:
    """Let the factors of every LoRA layer follow the sizes of its linear, from now on.

    Raises:
        AdapterError: As in :func:`attach_lora`.
    """
    layers = [
        layer
        for layer in peft_model.modules()
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), PartialLinear)
    ]
    for layer in layers:
        if any(layer.use_dora.values()):
            raise AdapterError("DoRA scales the whole weight, which a subnet does not have; set use_dora=False")
    factors = [
        (_partial(layer.get_base_layer()), _elastic(layer.lora_A[name]), _elastic(layer.lora_B[name]))
        for layer in layers
        for name in layer.lora_A
    ]
    repaired = [layer for layer in layers if _partial(layer.get_base_layer()).holds_repaired]
    following = _Following(elastic, factors, repaired)
    elastic.on_shape_change(following.follow)
    if repaired:
        elastic.model.register_forward_pre_hook(following.require_unmerged)


@dataclass(frozen=True, eq=False)
class _Following:
    """What a shape means for LoRA layers; no closures, so that a second tree takes it along."""

    elastic: ElasticModel
    factors: Sequence[tuple[PartialLinear, ElasticLinear, ElasticLinear]]
    repaired: Sequence[LoraLayer]

    def follow(self, shape: SubnetShape) -> None:
        for base, factor_a, factor_b in self.factors:
            factor_a.active_in, factor_b.active_rows = base.active_in, base.active_rows

    def require_unmerged(self, *_: object) -> None:
        for layer in self.repaired:
            if layer.merged and _partial(layer.get_base_layer()).repaired is not None:
                raise AdapterError(
                    f"the LoRA is merged into shared weights, and shape {self.elastic.shape} has repaired ones beside "
                    f"them; call unmerge_adapter(); they are kept apart, {NOT_MERGED}"
                )


def _partial(base: nn.Module) -> PartialLinear:
    assert isinstance(base, PartialLinear)
    return base


def _elastic(factor: nn.Module) -> ElasticLinear:
    assert isinstance(factor, nn.Linear)
    return factor if isinstance(factor, ElasticLinear) else ElasticLinear.convert(factor)
