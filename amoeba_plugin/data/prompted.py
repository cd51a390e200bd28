"""Multiple-choice questions as requests come: a prompt, of which some tokens may be left out, and its choices apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from amoeba_plugin.data.multiple_choice import Question, answered
from amoeba_plugin.errors import DataError


@dataclass(frozen=True)
class PromptedQuestion:
    """A question in tokens.

    Attributes:
        prompt: Ends where the answer begins.
        droppable: Positions of the prompt that may be left out: examples and context.
        choices: What may follow, in tokens.
        answer: Index of the true choice.
    """

    prompt: tuple[int, ...]
    droppable: range
    choices: tuple[tuple[int, ...], ...]
    answer: int


def prompted(
    question: Question, examples: Sequence[Question], tokenizer: PreTrainedTokenizerBase, letters: bool, most: int
) -> PromptedQuestion:
    """Tokenise a question behind answered examples.

    Args:
        question: Its context is droppable, as the examples are.
        examples: In the order in which they stand.
        tokenizer: Of the model that is asked.
        letters: List the choices with letters and ask for the letter; else ask for the text of the choice.
        most: Tokens of the prompt with a choice, at most.

    Raises:
        DataError: If it is longer, or a choice is no token.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    before = answered(examples, letters)
    text = before + question.prompt(letters)
    wholes = [ids(text + question.continuation(choice, letters)) for choice in range(len(question.choices))]
    prompt = ids(text)
    same = min(_common(prompt, whole) for whole in wholes)  # a tokenizer may join what meets at the border
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    longest = len(bos) + max(map(len, wholes))
    if longest > most or not same or any(len(whole) == same for whole in wholes):
        raise DataError(
            f"the question '{question.text[:40]}...' has {longest} tokens with its examples and its longest choice, "
            f"where {most} may be, or a choice that is no token; raise max_seq_length, or give fewer examples"
        )
    spare = min(_common(ids(before + question.before), prompt), same - 1)
    return PromptedQuestion(
        (*bos, *prompt[:same]),
        range(len(bos), len(bos) + spare),
        tuple(tuple(whole[same:]) for whole in wholes),
        question.answer,
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
