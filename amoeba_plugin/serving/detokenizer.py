"""From the tokens of an answer to its text as it grows: no half character is shown, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no whole character yet


class Detokenizer:
    """Makes text of one answer's tokens.

    Args:
        tokenizer: Of the model.
        stops: Texts behind which, and without which, the answer ends.

    Attributes:
        text: All that was shown so far.
        stopped: Whether a stop string was met; what follows is not shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._from, self._to = 0, 0  # tokens that are decoded with what is new, and how many of all became text
        self._held = ""  # what may be the beginning of a stop string
        self.text, self.stopped = "", False

    @property
    def length(self) -> int:
        """Characters of all whole ones so far, shown or held back."""
        return len(self.text) + len(self._held)

    def push(self, token: int) -> str:
        """Take a token, and return the text that can be shown now."""
        self._tokens.append(token)
        known, whole = self._decoded(self._from, self._to), self._decoded(self._from, len(self._tokens))
        if len(whole) <= len(known) or whole.endswith(HALF):
            return ""
        self._from, self._to = self._to, len(self._tokens)
        return self._show(whole[len(known) :])

    def finish(self) -> str:
        """Return what was held back as long as more could come; bytes that never became a character are left out."""
        rest = self._decoded(self._from, len(self._tokens))[len(self._decoded(self._from, self._to)) :].rstrip(HALF)
        self._from = self._to = len(self._tokens)
        shown = self._show(rest)
        if not self.stopped:
            shown, self.text, self._held = shown + self._held, self.text + self._held, ""
        return shown

    def _decoded(self, start: int, end: int) -> str:
        """Return the text of tokens; a decoder writes the first of a text in its own way, so that some stand before."""
        return str(
            self._tokenizer.decode(
                self._tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _show(self, new: str) -> str:
        if self.stopped:
            return ""
        pending = self._held + new
        met = [(at + len(stop), at) for stop in self._stops if (at := pending.find(stop)) >= 0]
        if met:
            _, at = min(met)  # the first that is complete, however the text came in pieces
            self.stopped, self._held, shown = True, "", pending[:at]
        else:
            keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
            shown, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string.

    >>> _overlap("a line\\n\\n", "\\n\\nQ:"), _overlap("abc", "x")
    (2, 0)
    """
    return max((size for size in range(1, min(len(text), len(stop)) + 1) if text.endswith(stop[:size])), default=0)
