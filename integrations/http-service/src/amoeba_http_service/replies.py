"""Answers in OpenAI's form, and what an answer got beside it, in the field ``amoeba``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from amoeba_http_service.asked import Asked
from amoeba_http_service.following import Shown, Told
from amoeba_plugin.serving.answer import Answer
from amoeba_plugin.serving.slo import Latency

HALF = "\N{REPLACEMENT CHARACTER}"
Fields = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """Writes one answer.

    Attributes:
        asked: What it answers.
        answer: That is being computed.
        tokenizer: Of the model.
        number: By which a client knows it.
        created: Seconds since 1970.
    """

    asked: Asked
    answer: Answer
    tokenizer: PreTrainedTokenizerBase
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: time.time_ns() // 10**9)

    def first(self) -> Fields:
        """Return the chunk in front of a stream: the role of a chat, and what the request got."""
        return self._chunk(self._delta({"role": "assistant", "content": ""}, ""), amoeba=self.got())

    def chunk(self, shown: Shown) -> Fields:
        """Return the chunk of what can be shown."""
        probabilities = self._probabilities(shown.tokens)
        return self._chunk(self._delta({"content": shown.text}, shown.text, probabilities))

    def last(self, reason: str) -> Fields:
        """Return the chunk that ends the choice."""
        return self._chunk(self._delta({}, "", finish_reason=reason), amoeba=self.got())

    def usage_chunk(self, produced: int) -> Fields:
        """Return the chunk behind it with how many tokens there were."""
        return {**self._chunk(None, amoeba=self.got()), "usage": self._usage(produced)}

    def whole(self, shown: Sequence[Shown], reason: str, produced: int) -> Fields:
        """Return the answer as one."""
        text = "".join(each.text for each in shown)
        choice: Fields = {"index": 0, "finish_reason": reason}
        choice["logprobs"] = self._probabilities([told for each in shown for told in each.tokens])
        if self.asked.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        fields = self._fields("chat.completion", "text_completion")
        return {**fields, "choices": [choice], "usage": self._usage(produced), "amoeba": self.got()}

    def got(self) -> Fields:
        """Return what the request got: shape, prompt, times; measured ones once it has ended."""
        answer, prompt = self.answer, self.asked.prompt
        tokens, kept = len(prompt.tokens), answer.kept
        return {
            "shape": str(answer.decision.shape),
            "in_time": answer.in_time,
            "prompt": {
                "tokens": tokens,
                "kept": len(kept),
                "share": round(len(kept) / tokens, 4),
                "positions": ranges(kept),
                "dropped": [
                    [span.text, span.start, span.end] for span in _dropped(prompt.sources, kept)
                ],
            },
            "promised": _milliseconds(answer.promised, self.asked.request.most),
            "measured": None if answer.measured is None else _milliseconds(answer.measured, 2),
        }  # fmt: skip

    def _usage(self, produced: int) -> Fields:
        prompt = len(self.asked.prompt.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced}

    def _fields(self, chat: str, completion: str) -> Fields:
        kind, start = (chat, "chatcmpl-") if self.asked.is_chat else (completion, "cmpl-")
        return {"id": f"{start}{self.number}", "object": kind, "created": self.created, "model": self.asked.model}

    def _chunk(self, choice: Fields | None, **more: Any) -> Fields:
        fields = self._fields("chat.completion.chunk", "text_completion")
        if self.asked.with_usage:
            more["usage"] = None
        return {**fields, "choices": [] if choice is None else [choice], **more}

    def _delta(
        self, delta: Fields, text: str, probabilities: Fields | None = None, finish_reason: str | None = None
    ) -> Fields:
        said = {"delta": delta} if self.asked.is_chat else {"text": text}
        return {"index": 0, **said, "logprobs": probabilities, "finish_reason": finish_reason}

    def _probabilities(self, tokens: Sequence[Told]) -> Fields | None:
        if not self.asked.with_probabilities:
            return None
        if not self.asked.is_chat:
            return {
                "tokens": [self._text(told.piece.token) for told in tokens],
                "token_logprobs": [told.piece.log_probability for told in tokens],
                "top_logprobs": [{self._text(token): value for token, value in _all(told)} for told in tokens],
                "text_offset": [told.start for told in tokens],
            }
        return {
            "content": [
                {
                    **self._token(told.piece.token, told.piece.log_probability),
                    "top_logprobs": [self._token(token, value) for token, value in told.piece.alternatives],
                }
                for told in tokens
            ],
            "refusal": None,
        }

    def _token(self, token: int, value: float) -> Fields:
        text = self._text(token)
        return {"token": text, "logprob": value, "bytes": None if HALF in text else [*text.encode()]}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def ranges(positions: Iterable[int]) -> list[list[int]]:
    """Return ascending positions as runs, each with its first one and the one behind its last.

    >>> ranges([0, 1, 2, 5, 6, 9])
    [[0, 3], [5, 7], [9, 10]]
    """
    found: list[list[int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1][1] += 1
        else:
            found.append([position, position + 1])
    return found


def _dropped(sources: Mapping[int, Any], kept: Sequence[int]) -> list[Any]:
    stay = kept if isinstance(kept, range) else set(kept)
    return [span for position, span in sources.items() if position not in stay]


def _all(told: Told) -> Iterable[tuple[int, float]]:
    """Return the alternatives of a token, and it itself."""
    return dict([*told.piece.alternatives, (told.piece.token, told.piece.log_probability)]).items()


def _milliseconds(latency: Latency, tokens: int) -> Fields:
    """Return a latency in milliseconds; of one token alone there is no time per token."""
    tpot = latency.tpot if tokens > 1 and latency.tpot else None
    return {"ttft_ms": round(latency.ttft * 1e3, 3), "tpot_ms": None if tpot is None else round(tpot * 1e3, 3)}
