"""Importances: how much every channel or unit matters; pure functions of statistics, weights and gradients.

Scores are compared after standardisation (``width/ranking.py``), so constant factors mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning
from torch import Tensor, nn

from amoeba_plugin.models.adapter import ChannelAxis, ChannelGroup

if TYPE_CHECKING:
    from amoeba_plugin.selection.activation_stats import ActivationStats


@dataclass(frozen=True)
class Importance:
    """A way to score the input channels of a group's consumer.

    Attributes:
        name: The name it is registered under.
        score: Maps statistics of the consumer's input and its weight, (out, in), to (in,) fp32; larger matters more.
        square_attention: Square the scores of attention channels before they are standardised, as FLAP's code does; it
            sharpens the contrast between heads.
        needs_statistics: False where ``score`` looks at the weight only.
        description: One line for people.
    """

    name: str
    score: Callable[[ActivationStats, Tensor], Tensor]
    square_attention: bool = False
    needs_statistics: bool = True
    description: str = ""


@dataclass(frozen=True)
class CoupledWeights:
    """All weights that share one group's units, in one layer.

    Attributes:
        group: Which rows of the producers and which columns of the consumer belong to a unit.
        weights: By axis of the group the whole weight that it lies in, (out, in), any float dtype.
        gradients: Of the mean calibration loss, same axes and shapes, fp32; empty where nobody asked for them.
    """

    group: ChannelGroup
    weights: Mapping[ChannelAxis, Tensor]
    gradients: Mapping[ChannelAxis, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupImportance:
    """A way to score the units of a group by all the weights they consist of.

    Attributes:
        name: The name it is registered under.
        score: Maps the weights, and their gradients where it needs them, to (units,); larger matters more.
        needs_gradients: True where ``score`` looks at gradients, which take a backward pass over the calibration data
            and 4 bytes of main memory for each weight (:func:`amoeba_plugin.selection.gradients.loss_gradients`).
        description: One line for people.
    """

    name: str
    score: Callable[[CoupledWeights], Tensor]
    needs_gradients: bool = False
    description: str = ""


@dataclass(frozen=True)
class MomentImportance:
    """A way to score the units of a group by its consumer's weight and the second moments of its input.

    Attributes:
        name: The name it is registered under.
        score: Maps the weight (out, in), the moments (in, in) fp64, and how many neighbouring channels a unit has, to
            (units,); larger matters more.
        description: One line for people.
    """

    name: str
    score: Callable[[Tensor, Tensor, int], Tensor]
    description: str = ""


AnyImportance = Importance | GroupImportance | MomentImportance


def weighted_input_fluctuation(stats: ActivationStats, weight: Tensor) -> Tensor:
    """Score channels by the variance that each contributes to the output (WIFV).

    Args:
        stats: Inputs seen by the linear; ``stats.variance`` is (in,), over tokens.
        weight: Its weight, (out, in), any float dtype.

    Returns:
        (in,), fp32; the unit is the output's variance.
    """
    # S_j = Var_t(x_j) * ||W_:j||_2^2  (FLAP, arXiv:2312.11983, eq. 4)
    return _on(weight, stats.variance).mul(weight.double().square().sum(dim=0)).float()


def input_fluctuation(stats: ActivationStats, weight: Tensor) -> Tensor:
    """Score channels by the variance of the input alone (IFV); same arguments and result as WIFV."""
    # S_j = Var_t(x_j)
    return _on(weight, stats.variance).float()


def weighted_input_norm(stats: ActivationStats, weight: Tensor) -> Tensor:
    """Score channels by mean absolute weight times input norm (WIFN, and Wanda's structured form)."""
    # S_j = mean_i |W_ij| * sqrt(mean_t x_j^2)  (Wanda, arXiv:2306.11695, summed over output rows)
    return _on(weight, stats.second_moment).sqrt().mul(weight.double().abs().mean(dim=0)).float()


def column_norm(stats: ActivationStats, weight: Tensor) -> Tensor:
    """Score channels by the Euclidean norm of their weight column; statistics are not looked at."""
    # S_j = ||W_:j||_2
    return weight.double().square().sum(dim=0).sqrt().float()


def group_taylor(coupled: CoupledWeights) -> Tensor:
    """Score units by the sum of |gradient x weight| over the elements of all their weights, by torch-pruning.

    First-order Taylor expansion of the loss that removing the unit adds (ELMS, arXiv:2409.09071, section 3.1; "param
    first" of LLM-Pruner, arXiv:2305.11627).

    Returns:
        (units,), fp32, nats per token.
    """
    # imp_u = sum over elements of unit u of |dL/dW * W|
    return _by_unit(torch_pruning.importance.GroupTaylorImportance, coupled)


def group_taylor_vector(coupled: CoupledWeights) -> Tensor:
    """Score units by |sum of gradient x weight| of each row or column, summed ("vector" of LLM-Pruner)."""
    return _by_unit(torch_pruning.importance.GroupTaylorImportance, coupled, multivariable=True)


def group_magnitude(coupled: CoupledWeights) -> Tensor:
    """Score units by the sum of squares of all their weights, by torch-pruning: (units,), fp32."""
    return _by_unit(torch_pruning.importance.GroupMagnitudeImportance, coupled, p=2)


def _by_unit(
    kind: Callable[..., torch_pruning.importance.Importance], coupled: CoupledWeights, **options: Any
) -> Tensor:
    """Let torch-pruning sum its group importance over the channels of each unit.

    The group is made by hand: what belongs together is known, and torch-pruning's own graph is wrong where query heads
    share keys and values.
    """
    group = torch_pruning.dependency.Group()
    units = torch.arange(coupled.group.units)
    ends = [(axis, torch_pruning.prune_linear_out_channels) for axis in coupled.group.producers]
    for axis, prune in (*ends, (coupled.group.consumer, torch_pruning.prune_linear_in_channels)):
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(coupled.weights[axis].detach().to("cpu", torch.float32))
        if coupled.gradients:
            linear.weight.grad = coupled.gradients[axis]
        node = torch_pruning.dependency.Node(linear, None, axis.path)
        group.add_dep(torch_pruning.dependency.Dependency(prune, prune, node, node), axis.channels(units).tolist())
        group[-1].root_idxs = units.repeat_interleave(axis.channels_per_unit).tolist()
    importance = kind(group_reduction="sum", normalizer=None, **options)
    scores: Tensor = importance(group)
    return scores[: len(units)]  # the sum has as many places as the first axis has channels


def _on(weight: Tensor, statistic: Tensor) -> Tensor:
    # fp64: an 8-bit bf16 significand would leave ranks to ties, and squares of fp32 can underflow
    return statistic.to(weight.device).double()
