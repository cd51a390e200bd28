"""Repaired weights in a live elastic model: held beside the shared ones, and, where those are trained, with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from amoeba_plugin.elastic.experts import ElasticExperts
from amoeba_plugin.elastic.group import ElasticGroup
from amoeba_plugin.elastic.repairs import Place, Repairs

Groups = Iterable[ElasticGroup]
Experts = Iterable[ElasticExperts]


def hold(repairs: Repairs, groups: Groups, experts: Experts, dtype: torch.dtype) -> None:
    """Give every consumer its repaired weights, in a dtype.

    Raises:
        ArtifactError: If they are of another size than the consumer has.
    """
    for group in groups:
        group.hold_repaired(repairs.of(group.key), dtype)
    for some in experts:
        some.hold_repaired({key: repairs.of(key) for key in some.groups}, dtype)


@torch.no_grad()
def hold_as_changes(groups: Groups, experts: Experts) -> None:
    """Where shared weights are to be trained, let repaired ones be them plus what repair changed.

    Every shape then trains the shared weights, as without repair. What is so already stays.
    """
    for group in groups:
        consumer = group.consumer
        if group.repaired and not consumer.repairs_are_changes and _is_trained(consumer, "weight"):
            for name in group.repaired.values():
                held = consumer.get_buffer(name)
                held.sub_(consumer.get_parameter("weight")[:, : held.shape[1]])
            consumer.repairs_are_changes = True
    for some in experts:
        module = some.module
        if some.repaired and not module.replacements_are_changes and _is_trained(module, some.consumer):
            for name in some.repaired.values():
                held = module.get_buffer(name)
                held.sub_(module.get_parameter(some.consumer)[..., : held.shape[-1]])
            module.replacements_are_changes = True


@torch.no_grad()
def as_trained(
    repairs: Repairs, groups: Groups, experts: Experts, loaded: Callable[[nn.Module], AbstractContextManager[object]]
) -> Repairs:
    """Return the repaired weights of a model whose shared weights were trained, on the CPU.

    Args:
        repairs: Those that it was made with.
        groups: Of the model.
        experts: Of the model.
        loaded: Has a layer's whole weights in memory for a block of code.
    """
    weights: dict[Place, dict[str, Tensor]] = {place: {} for place in repairs.weights}
    for group in groups:
        with loaded(group.layer):
            for place, name in group.repaired.items():
                weights[place][group.key] = _now(group.consumer, "weight", name, group.consumer.repairs_are_changes)
    for some in experts:
        with loaded(some.layer):
            for place, name in some.repaired.items():
                each = _now(some.module, some.consumer, name, some.module.replacements_are_changes)
                weights[place] |= dict(zip(some.groups, each, strict=True))
    return replace(repairs, weights=weights)


def _is_trained(module: nn.Module, parameter: str) -> bool:
    weight = module._parameters.get(parameter)  # a packed one is none
    return weight is not None and weight.requires_grad


def _now(module: nn.Module, parameter: str, buffer: str, are_changes: bool) -> Tensor:
    held = module.get_buffer(buffer)
    shared = module.get_parameter(parameter)[..., : held.shape[-1]] if are_changes else 0
    return (held + shared).detach().to("cpu", copy=True)
