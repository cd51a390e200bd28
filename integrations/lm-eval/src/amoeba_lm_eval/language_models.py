"""What lm_eval asks: transformers with a loaded model, or the engine of a deployed subnet."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from amoeba_plugin.deployment.deployed import Opening
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.errors import DataError

Encoded = tuple[Any, list[int], list[int]]  # text, tokens of the context, and of what is scored behind it
LONGEST_ANSWER = 64_000_000  # bytes of log-probabilities that an engine sends at a time


class CountsCut(TemplateLM):
    """Counts requests whose beginning the model does not see, and refuses those whose end it would not.

    Attributes:
        cut: How many were cut so far.
    """

    cut = 0
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
    """A deployed subnet, by the log-probabilities of its own engine.

    Args:
        engine: With the subnet loaded.
        opening: How its tokenizer begins.
        max_length: Tokens that one request may have.
    """

    def __init__(self, engine: EngineProcess, opening: Opening, max_length: int) -> None:
        super().__init__()
        self._engine, self._opening, self.max_length = engine, opening, max_length
        self._ids: dict[str, list[int]] = {}
        self._positions = 1  # asked at a time; more once it is known how large a vocabulary is

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
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # choices of one token differ in nothing else
        for index, (_, context, scored) in enumerate(requests):
            alike[tuple([*context, *scored][-(self.max_length + 1) : -1])].append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for tokens in sorted(alike):  # one after another with the same beginning, which an engine may keep
            longest = max(len(requests[index][2]) for index in alike[tokens])
            behind = range(len(tokens) - longest + 1, len(tokens) + 1)
            targets = {index: requests[index][2] for index in alike[tokens]}
            logs: dict[int, list[float]] = {index: [] for index in targets}
            greedy = dict.fromkeys(targets, True)
            for position, row in zip(behind, self._rows(tokens, behind), strict=True):
                for index, scored in targets.items():
                    place = position - (len(tokens) - len(scored) + 1)
                    if place >= 0:
                        logs[index].append(float(row[scored[place]]))
                        greedy[index] &= int(row.argmax()) == scored[place]
            for index in targets:
                found[index] = (float(np.sum(logs[index])), greedy[index])
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return found

    def _rows(self, tokens: Sequence[int], behind: Sequence[int]) -> Iterable[NDArray[np.float64]]:
        """Yield the log-probabilities of the vocabulary behind each number of tokens; an engine's sums are not quite
        1."""
        asked = iter(behind)
        while part := list(islice(asked, self._positions)):
            answer = self._engine.ask("log_probabilities", tokens=list(tokens[: part[-1]]), behind=part).value
            self._positions = max(1, LONGEST_ANSWER // len(answer[0]))
            for each in answer:
                row = np.frombuffer(base64.b64decode(each), "<f4").astype(np.float64)
                yield row - np.logaddexp.reduce(row)

    def _read(self, texts: Iterable[str]) -> None:
        ordered = sorted(texts)
        self._ids.update(zip(ordered, self._engine.ask("tokenize", texts=ordered).value, strict=True))


class EngineLM(CountsCut, _Engine):
    """A deployed subnet in its own engine: what runs is what is scored."""
