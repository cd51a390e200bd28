"""From what a client sent to a request of the service, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amoeba_http_service.bodies import Body, ChatBody, CompletionBody, SloBody
from amoeba_http_service.resident import Resident
from amoeba_http_service.settings import DEFAULT_ANSWER, SHORT_ANSWER, Limits
from amoeba_plugin.errors import DataError
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.sampling import Sampling
from amoeba_plugin.serving.slo import Slo
from amoeba_plugin.serving.texts import PromptTokens
from amoeba_plugin.shape import SubnetShape

AUTO = "auto"


class UnknownModelError(DataError):
    """A name that is neither ``auto``, nor the model's, nor one of its shapes."""


@dataclass(frozen=True)
class Asked:
    """A request, and how its answer is told.

    Attributes:
        request: For the service.
        prompt: Its prompt, with what each token that may go says.
        stops: Texts that end the answer.
        model: As the client named it.
        is_chat: A chat, or a completion.
        is_streamed: Token by token.
        with_usage: A stream ends with how many tokens there were.
        with_probabilities: Tokens and their probabilities are told.
    """

    request: Request
    prompt: PromptTokens
    stops: tuple[str, ...]
    model: str
    is_chat: bool
    is_streamed: bool
    with_usage: bool
    with_probabilities: bool


def asked_of(body: ChatBody | CompletionBody, resident: Resident, limits: Limits) -> Asked:
    """Return what a body asks for.

    Raises:
        DataError: If a prompt or an answer is longer than it may be, or options contradict each other.
        SloError: If targets are none, or contradict each other.
        UnknownModelError: If there is no model of that name.
    """
    shape = shape_named(body.model, resident)
    slo, best_effort = slo_of(body.slo)
    prompt = _prompt(body, resident)
    allowed = limits.prompt
    if allowed is not None and len(prompt.tokens) > allowed:
        raise DataError(f"the prompt has {len(prompt.tokens)} tokens, and may have {allowed}; shorten it")
    request = Request(
        prompt.tokens, slo, _most(body, len(prompt.tokens), resident, limits), _sampling(body), resident.ends,
        best_effort, shape, _alternatives(body), prompt.droppable,
    )  # fmt: skip
    options = body.stream_options
    if options is not None and not body.stream:
        raise DataError("stream_options belong to a stream; set stream, or leave them out")
    return Asked(
        request, prompt, body.stops, body.model, isinstance(body, ChatBody), bool(body.stream),
        bool(options and options.include_usage), _tells(body),
    )  # fmt: skip


def shape_named(name: str, resident: Resident) -> SubnetShape | None:
    """Return the shape that a client named; ``None``: the service decides.

    Raises:
        UnknownModelError: If it is none.
    """
    if name in (AUTO, resident.name):
        return None
    try:
        return resident.space.require(name)
    except ValueError as error:
        raise UnknownModelError(
            f"no model named '{name}': there are {AUTO}, and the shapes that GET /v1/models lists, such as "
            f"{resident.space.smallest}"
        ) from error


def slo_of(body: SloBody | None) -> tuple[Slo, bool]:
    """Return targets, and whether an answer below them is wanted where they cannot be kept."""
    if body is None:
        return Slo(), False
    told: Mapping[str, Any] = body.model_dump(exclude={"best_effort"}, exclude_none=True)
    return Slo.of_fields(told), body.best_effort


def _prompt(body: ChatBody | CompletionBody, resident: Resident) -> PromptTokens:
    if isinstance(body, ChatBody):
        return resident.texts.of_messages([{"role": each.role, "content": each.text} for each in body.messages])
    if isinstance(body.prompt, str):
        return resident.texts.of_prompt(body.prompt, body.context)
    if body.context:
        raise DataError("a context stands in front of a text; send the prompt as a text, or leave context out")
    known = len(resident.tokenizer)
    wrong = next((token for token in body.prompt if not 0 <= token < known), None)
    if wrong is not None:
        raise DataError(f"token {wrong} of the prompt is none of this model's: they are 0 to {known - 1}")
    return PromptTokens(body.prompt)


def _most(body: ChatBody | CompletionBody, prompt: int, resident: Resident, limits: Limits) -> int:
    """Return how many tokens an answer may have; where none are named, a default that fits."""
    named = [body.max_tokens, getattr(body, "max_completion_tokens", None)]
    told = [each for each in named if each is not None]
    if len(set(told)) > 1:
        raise DataError(f"max_tokens is {named[0]} and max_completion_tokens {named[1]}; send one of them")
    if told:
        if told[0] > limits.answer:
            raise DataError(f"an answer of {told[0]} tokens is asked for, and may have {limits.answer}; ask for fewer")
        return told[0]
    most = min(DEFAULT_ANSWER if isinstance(body, ChatBody) else SHORT_ANSWER, limits.answer)
    context = resident.backend.context
    return most if context is None else max(min(most, context - prompt), 1)


def _sampling(body: Body) -> Sampling:
    """Return how tokens are drawn, by OpenAI's defaults."""
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    top_p = 1.0 if body.top_p is None else float(body.top_p)
    return Sampling(temperature, top_p, 0, None if body.seed is None else body.seed % 2**63)


def _tells(body: ChatBody | CompletionBody) -> bool:
    return bool(body.logprobs) if isinstance(body, ChatBody) else body.logprobs is not None


def _alternatives(body: ChatBody | CompletionBody) -> int:
    if not isinstance(body, ChatBody):
        return body.logprobs or 0
    if body.top_logprobs is not None and not body.logprobs:
        raise DataError("top_logprobs belong to logprobs; set logprobs, or leave them out")
    return body.top_logprobs or 0
