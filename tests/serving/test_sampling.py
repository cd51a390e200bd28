"""Tokens that are drawn, at the ends of what a request may ask for."""

from __future__ import annotations

import pytest
import torch

from amoeba_plugin.serving.sampling import Sampler, Sampling, likeliest

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 30


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-310, 2e-38, 1e-30, 1e-3])
@pytest.mark.parametrize("top_p", [1.0, 1e-300])
def test_at_tiny_temperatures_the_likeliest_is_drawn(temperature: float, top_p: float):
    token, value = Sampler(Sampling(temperature, top_p, seed=1)).draw(LOGITS)
    assert token == int(LOGITS.argmax())
    assert value == pytest.approx(float(LOGITS.log_softmax(-1)[token]))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    sampler, logits = Sampler(Sampling(2.0, seed=5)), torch.tensor([0.0, 2.0, 4.0, -80.0])
    drawn = torch.tensor([sampler.draw(logits)[0] for _ in range(4000)]).bincount(minlength=4) / 4000
    assert drawn.tolist() == pytest.approx((logits / 2).softmax(-1).tolist(), abs=0.03)


def test_the_likeliest_are_in_order_and_never_more_than_there_are():
    assert [token for token, _ in likeliest(LOGITS, 3)] == LOGITS.argsort(descending=True)[:3].tolist()
    assert len(likeliest(LOGITS, 99)) == 50
    assert likeliest(LOGITS, 0) == []
