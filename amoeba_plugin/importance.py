"""Importances: how much every input channel of a linear matters; pure functions of statistics and weight.

Scores are compared after standardisation (:mod:`amoeba_plugin.width`), so constant factors mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from amoeba_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from amoeba_plugin.calibration import ActivationStats


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


def _on(weight: Tensor, statistic: Tensor) -> Tensor:
    # fp64: an 8-bit bf16 significand would leave ranks to ties, and squares of fp32 can underflow
    return statistic.to(weight.device).double()


@hookimpl
def amoeba_importances() -> Mapping[str, Importance]:
    """Return FLAP's three metrics, Wanda and magnitude."""
    built_in = (
        Importance(
            "flap",
            weighted_input_fluctuation,
            square_attention=True,
            description="input variance x weight norm^2 (WIFV)",
        ),
        Importance("flap_ifv", input_fluctuation, square_attention=True, description="input variance (IFV)"),
        Importance(
            "flap_wifn", weighted_input_norm, square_attention=True, description="mean |weight| x input norm (WIFN)"
        ),
        Importance(
            "wanda", weighted_input_norm, description="mean |weight| x input norm, heads not squared (Wanda-sp)"
        ),
        Importance(
            "magnitude", column_norm, needs_statistics=False, description="weight norm of the consumer's column"
        ),
    )
    return {importance.name: importance for importance in built_in}
