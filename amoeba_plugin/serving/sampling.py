"""The next token of an answer: the likeliest, or drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from amoeba_plugin.errors import DataError

TINY = torch.finfo(torch.float32).tiny  # a temperature below it is 0 in fp32


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: Draw among the fewest tokens that have so much probability together, in (0, 1].
        top_k: Draw among so many of the likeliest; 0: among all.
        seed: Of this answer's draws; ``None``: another one every time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value} ({possible})"
            for name, value, possible, good in (
                ("temperature", self.temperature, "0 to 100", 0 <= self.temperature <= 100),
                ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
                ("top_k", self.top_k, "0 or more", self.top_k >= 0),
                ("seed", self.seed, "0 to 2^63 - 1", self.seed is None or 0 <= self.seed < 2**63),
            )
            if not (good and (value is None or math.isfinite(value)))
        ]
        if wrong:
            raise DataError(f"impossible sampling: {', '.join(wrong)}")


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: How.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._greedy, self._warpers = sampling.temperature < TINY, LogitsProcessorList()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, logits: Tensor) -> tuple[int, float]:
        """Return a token, and the logarithm of the probability that the model gives it.

        Args:
            logits: (vocabulary,), any float dtype.
        """
        known = logits.float().cpu()
        token = int(known.argmax())
        if not self._greedy:
            none = torch.empty(1, 0, dtype=torch.long)  # no warper here looks at the tokens so far
            shifted = known - known.max()  # of tiny temperatures what is not the likeliest alone overflows
            warped = self._warpers(none, shifted[None])  # type: ignore[arg-type]
            token = int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))
        return token, float(known.log_softmax(-1)[token])


def likeliest(logits: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the likeliest tokens with the logarithms of their probabilities, the likeliest first.

    Args:
        logits: (vocabulary,), any float dtype.
        count: How many of them, at most.
    """
    if not count:
        return []
    found = logits.float().cpu().log_softmax(-1).topk(min(count, logits.shape[-1]))
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
