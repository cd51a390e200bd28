"""Importances against five-line loops over channels and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amoeba_plugin.selection.activation_stats import ActivationStats
from amoeba_plugin.selection.builtin import amoeba_importances
from amoeba_plugin.selection.importance import Importance

IMPORTANCES = {name: each for name, each in amoeba_importances().items() if isinstance(each, Importance)}


@pytest.fixture
def inputs() -> Tensor:
    """(tokens, channels); means, spreads and signs differ from channel to channel."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=generator) * torch.rand(6, generator=generator) + torch.randn(
        6, generator=generator
    )


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def expected(name: str, inputs: Tensor, weight: Tensor) -> list[float]:
    scores = []
    for j in range(inputs.shape[1]):
        x, w = inputs[:, j].tolist(), weight[:, j].tolist()
        mean = sum(x) / len(x)
        variance = sum((value - mean) ** 2 for value in x) / len(x)
        norm = sum(value**2 for value in w)
        wanda = sum(map(abs, w)) / len(w) * math.sqrt(sum(value**2 for value in x) / len(x))
        of = {
            "flap": variance * norm,
            "flap_ifv": variance,
            "flap_wifn": wanda,
            "wanda": wanda,
            "magnitude": math.sqrt(norm),
        }
        scores.append(of[name])
    return scores


@pytest.mark.parametrize("name", ["flap", "flap_ifv", "flap_wifn", "wanda", "magnitude"])
def test_scores_equal_a_loop(name: str, inputs: Tensor, weight: Tensor) -> None:
    scores = IMPORTANCES[name].score(ActivationStats.of(inputs), weight)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected(name, inputs, weight)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(IMPORTANCES))
def test_scores_of_a_bf16_weight_are_those_of_its_values(name: str, inputs: Tensor, weight: Tensor) -> None:
    stats, rounded = ActivationStats.of(inputs), weight.bfloat16()
    torch.testing.assert_close(
        IMPORTANCES[name].score(stats, rounded), IMPORTANCES[name].score(stats, rounded.float()), rtol=0, atol=0
    )


def test_flap_squares_attention_and_the_others_do_not() -> None:
    # FLAP's code squares o_proj's metric whichever it is; its Wanda-sp does not
    assert {name for name, each in IMPORTANCES.items() if each.square_attention} == {"flap", "flap_ifv", "flap_wifn"}
    assert {name for name, each in IMPORTANCES.items() if not each.needs_statistics} == {"magnitude"}


def test_a_channel_that_never_varies_is_worth_nothing_to_flap(weight: Tensor) -> None:
    inputs = torch.full((7, 6), 3.0)
    assert IMPORTANCES["flap"].score(ActivationStats.of(inputs), weight).tolist() == [0.0] * 6
    assert bool((IMPORTANCES["wanda"].score(ActivationStats.of(inputs), weight) > 0).all())
