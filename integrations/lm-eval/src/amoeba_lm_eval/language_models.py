"""What lm_eval asks: transformers with a loaded model, or the engine of a deployed subnet."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from amoeba_plugin.deployment.deployed import Opening
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.errors import DataError

CERTAIN = -0.69  # nats: a token of more than half of the probability is the likeliest
Encoded = tuple[Any, list[int], list[int]]  # text, tokens of the context, and of what is scored behind it


class CountsCut(TemplateLM):
    """Counts requests whose beginning the model does not see, and refuses those whose end it would not.

    Attributes:
        cut: How many were cut so far.
        needs_likeliest: Whether it has to be told if a continuation is the likeliest; engines take long to find out.
    """

    cut, needs_likeliest = 0, True
    max_length: int

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for text, context, scored in requests:
            if len(scored) > self.max_length:
                raise DataError(
                    f"{len(scored)} tokens are to be scored at once, and the model sees {self.max_length} "
                    f"({str(text)[:60]!r}...); raise --max-length, or take another task"
                )
            self.cut += len(context) + len(scored) > self.max_length + 1
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)  # type: ignore[safe-super]
        return found


class TransformersLM(CountsCut, HFLM):
    """A model in memory: whatever shape is active is what computes."""

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, nats; some at a time, so that progress can be told."""
        found: list[float] = []
        while part := requests[len(found) : len(found) + self.batch_size]:
            found += super().loglikelihood_rolling(part, disable_tqdm=True)
        return found


class _Engine(TemplateLM):
    """A deployed subnet, by the likelihoods that its own engine gives tokens.

    Args:
        engine: With the subnet loaded.
        opening: How its tokenizer begins.
        max_length: Tokens that one request may have.
    """

    def __init__(self, engine: EngineProcess, opening: Opening, max_length: int) -> None:
        super().__init__()
        self._engine, self._opening, self.max_length = engine, opening, max_length
        self._ids: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """Return what stands in front of a text with nothing before it."""
        assert self._opening.first is not None
        return self._opening.first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the engine's tokens, and in front of them those that the model's tokenizer adds."""
        if string not in self._ids:
            self._read([string])
        return [*([] if add_special_tokens is False else self._opening.added), *self._ids[string]]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return of each continuation its log-likelihood, nats, and whether it is the likeliest."""
        self._ids = {}
        pairs = [request.args for request in requests]
        self._read({context + rest for context, rest in pairs} | {context.rstrip() for context, _ in pairs if context})
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, nats, by windows as the harness cuts them for transformers."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(each)) for each in windows])
            found.append(sum(likelihood for likelihood, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Refuse: an engine is asked for probabilities.

        Raises:
            DataError: Always.
        """
        raise DataError("a deployed subnet is scored by its probabilities, and the task wants written answers")

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = [[*context, *scored][-(self.max_length + 1) :] for _, context, scored in requests]
        for index in sorted(range(len(rows)), key=rows.__getitem__):  # an engine may keep what two begin with
            text, _, scored = requests[index]
            tokens, behind = rows[index], list(range(len(rows[index]) - len(scored), len(rows[index])))
            told = self._engine.ask("token_log_probabilities", tokens=tokens, behind=behind).value
            wanted = self.needs_likeliest and text is not None  # of windows of a text nobody asks it
            likeliest = wanted and self._are_likeliest(tokens, behind, told)
            found[index] = (sum(told), likeliest)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[index])
        return found

    def _are_likeliest(self, tokens: list[int], behind: list[int], told: list[float]) -> bool:
        """Tell whether every token was the likeliest; the vocabulary is asked where that is not plain."""
        for count, likelihood in zip(behind, told, strict=True):
            if likelihood > CERTAIN:
                continue
            (row,) = self._engine.ask("log_probabilities", tokens=tokens[:count], behind=[count]).value
            if np.frombuffer(base64.b64decode(row), "<f4").argmax() != tokens[count]:
                return False
        return True

    def _read(self, texts: Iterable[str]) -> None:
        ordered = sorted(texts)
        self._ids.update(zip(ordered, self._engine.ask("tokenize", texts=ordered).value, strict=True))


class EngineLM(CountsCut, _Engine):
    """A deployed subnet in its own engine: what runs is what is scored."""
