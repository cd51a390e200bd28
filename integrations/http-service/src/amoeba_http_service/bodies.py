"""What requests may say: OpenAI's fields, some with one possible value, and ours, ``slo`` and ``context``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_STOPS, LONGEST_STOP = 4, 200
MOST_MESSAGES = 1000
MOST_ALTERNATIVES = 20


def _only(*values: Any) -> Any:
    """Return the type of a field of OpenAI's that changes nothing at these values, and is not supported at others."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError("is not supported by this server at this value; leave it out")
        return value

    return Annotated[Any, AfterValidator(check), Field(json_schema_extra={"enum": [None, *values]})]


Neutral = Annotated[Any, Field(description="Taken, and passed over.")]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of what is asked; its fields are as they are named, and of the type that is named."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SloBody(Part):
    """Targets for time; what is not named may take as long as it likes.

    Attributes:
        ttft: To the first token, as a share of what the whole model takes.
        ttft_ms: In milliseconds.
        tpot: For each token behind it, likewise.
        tpot_ms: In milliseconds.
        total_ms: For the whole answer; stands alone.
        best_effort: Be answered below the targets where they cannot be kept, rather than refused.
    """

    ttft: Share | None = None
    ttft_ms: Milliseconds | None = None
    tpot: Share | None = None
    tpot_ms: Milliseconds | None = None
    total_ms: Milliseconds | None = None
    best_effort: bool = False


class TextPart(Part):
    """A part of a content; there are texts alone."""

    type: Literal["text"]
    text: str


class Message(Part):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Neutral = None

    @property
    def text(self) -> str:
        """Its content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Part):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Neutral = None


class Body(Part):
    """What chats and completions have in common."""

    model: str = Field("auto", max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    slo: SloBody | None = None
    n: _only(1) = None  # type: ignore[valid-type]
    presence_penalty: _only(0) = None  # type: ignore[valid-type]
    frequency_penalty: _only(0) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    user: Neutral = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatBody(Body):
    """A chat, of which the last message is the question."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    tools: _only([]) = None  # type: ignore[valid-type]
    tool_choice: _only("none", "auto") = None  # type: ignore[valid-type]
    functions: _only([]) = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    parallel_tool_calls: Neutral = None
    metadata: Neutral = None
    store: _only(False) = None  # type: ignore[valid-type]
    service_tier: Neutral = None
    safety_identifier: Neutral = None
    prompt_cache_key: Neutral = None


class CompletionBody(Body):
    """A text to go on with, and context in front of it, of which tokens may be left out."""

    prompt: str | list[int]
    context: str = ""
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: _only(False) = None  # type: ignore[valid-type]
    best_of: _only(1) = None  # type: ignore[valid-type]
    suffix: _only("") = None  # type: ignore[valid-type]
