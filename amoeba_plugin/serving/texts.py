"""From chat messages, or a text, to the tokens of a request, and which of them may be left out.

What may be left out is what a user calls context: the contents of all messages before the last one, or the text in
front of a prompt. The last message, or the prompt itself, and everything that a template writes are never cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.errors import DataError

MARK = "\ue000{}\ue001"  # of the private use area: stands for a content, to see what a template writes around it


@dataclass(frozen=True)
class Span:
    """Characters of one of the texts that a request came with.

    Attributes:
        text: Which one: the number of a message, or 0, the context.
        start: The first of them.
        end: Behind the last of them.
    """

    text: int
    start: int
    end: int


@dataclass(frozen=True)
class PromptTokens:
    """A prompt, ready for a :class:`~amoeba_plugin.serving.answer.Request`.

    Attributes:
        tokens: Of the whole of it.
        sources: By the position of a token that may be left out, ascending: what it says.
    """

    tokens: Sequence[int]
    sources: Mapping[int, Span] = field(default_factory=dict)

    @property
    def droppable(self) -> tuple[int, ...]:
        """Positions of tokens that may be left out, ascending."""
        return tuple(self.sources)


class Texts:
    """Makes prompts of what one tokenizer knows.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self._tokenizer.chat_template)

    def of_messages(self, messages: Sequence[Mapping[str, str]]) -> PromptTokens:
        """Return a chat as the tokenizer's template writes it, up to where the assistant's answer begins.

        Args:
            messages: Each with ``role`` and ``content``, the question last.

        Raises:
            DataError: If there is no message, or no template, or it refuses the messages.
        """
        if not messages:
            raise DataError("a chat has no message; send one at least")
        if not self.chats:
            raise DataError("this model's tokenizer has no chat template; send a prompt, without messages")
        text = self._rendered(messages)
        spans = _contents(self._skeleton(messages), text, [message["content"] for message in messages])
        return self._tokens(text, spans[:-1], template=True)

    def of_prompt(self, prompt: str, context: str = "") -> PromptTokens:
        """Return a text with what the tokenizer puts in front of every text.

        Args:
            prompt: Never cut.
            context: Stands in front of it, and may be left out, token by token.

        Raises:
            DataError: If they hold what is no character.
        """
        return self._tokens(context + prompt, [(Span(0, 0, len(context)), 0)] if context else [], template=False)

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:  # what templates raise of messages they do not take
            raise DataError(f"the model's chat template refuses these messages: {error}") from error
        return str(text)

    def _skeleton(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what the template writes around contents; empty: it cannot be told."""
        try:
            return self._rendered(
                [{**message, "content": MARK.format(number)} for number, message in enumerate(messages)]
            )
        except DataError:
            return ""

    def _tokens(self, text: str, spans: Sequence[tuple[Span, int]], template: bool) -> PromptTokens:
        """Return the tokens of a text, of which those within spans may be left out.

        Raises:
            DataError: If it holds what is no character.

        Args:
            text: All of it.
            spans: What may be left out, ascending, each with where it stands in the text.
            template: It is a template's, which writes special tokens itself.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text has half a surrogate pair at character {error.start}: no character") from error
        fast = self._tokenizer.is_fast
        found = self._tokenizer(text, add_special_tokens=not template, return_offsets_mapping=fast)
        offsets = found["offset_mapping"] if fast and spans else []
        starts, sources = [at for _, at in spans], {}
        for position, (start, end) in enumerate(offsets):
            number = bisect_right(starts, start) - 1
            if number < 0 or end <= start:
                continue
            span, at = spans[number]
            if end - at <= span.end - span.start:
                sources[position] = Span(span.text, span.start + start - at, span.start + end - at)
        return PromptTokens(list(found["input_ids"]), sources)


def _contents(skeleton: str, text: str, contents: Sequence[str]) -> list[tuple[Span, int]]:
    """Return the span of every content, with where it stands in the text that a template made of them.

    A template may strip contents. Of one that does anything else to them, or not all of them in order, nothing is
    returned, so that nothing is cut.
    """
    found, at, rest = [], 0, skeleton
    for number, content in enumerate(contents):
        before, mark, rest = rest.partition(MARK.format(number))
        if not mark or not text.startswith(before, at):
            return []
        at += len(before)
        stripped = content.strip()
        kept = content if text.startswith(content, at) else stripped
        if not text.startswith(kept, at):
            return []
        # a template that strips writes less than was sent; which of the two it wrote, what follows has to tell
        follows = rest.partition(MARK.format(number + 1))[0]
        if kept is content and not text.startswith(follows, at + len(content)):
            kept = stripped
        start = content.index(kept)
        found.append((Span(number, start, start + len(kept)), at))
        at += len(kept)
    return found if text[at:] == rest else []
