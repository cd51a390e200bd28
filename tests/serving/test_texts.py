"""Which tokens of a prompt may be left out, against the tokenizer's own text of every token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from amoeba_plugin.errors import DataError
from amoeba_plugin.serving.texts import PromptTokens, Texts
from amoeba_plugin.testing.flows import TEMPLATE, tokenizer

STRIPPING = TEMPLATE.replace("m['content']", "m['content'] | trim")
REWRITING = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
LAST_ONLY = "{{ messages[-1]['content'] }}"
KNOWN = tokenizer()


def texts_of(template: str | None) -> Texts:
    KNOWN.chat_template = template
    return Texts(KNOWN)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if number % 2 else "system", "content": each} for number, each in enumerate(contents)]


def dropped(prompt: PromptTokens) -> str:
    return KNOWN.decode([prompt.tokens[position] for position in prompt.droppable])


def left(prompt: PromptTokens) -> str:
    return KNOWN.decode([token for number, token in enumerate(prompt.tokens) if number not in set(prompt.droppable)])


contents = st.text(st.sampled_from("ab yz<>\nturnsystemuser\u00e9\U0001f642"), max_size=12)


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING])
@given(earlier=st.lists(contents, max_size=4), last=contents)
def test_contents_before_the_last_may_go_and_the_template_and_the_question_never(
    template: str, earlier: list[str], last: str
):
    texts, messages = texts_of(template), chat(*earlier, last)
    prompt = texts.of_messages(messages)
    rendered = KNOWN.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert list(prompt.tokens) == KNOWN(rendered, add_special_tokens=False)["input_ids"]
    assert list(prompt.droppable) == sorted(prompt.droppable)
    around = KNOWN.apply_chat_template(chat(*[""] * len(earlier), last), tokenize=False, add_generation_prompt=True)
    characters = iter(left(prompt))  # what stays holds what is around the contents, in order
    assert all(each in characters for each in around)
    for position, span in prompt.sources.items():
        said = messages[span.text]["content"][span.start : span.end]
        assert span.text < len(messages) - 1
        whole = KNOWN.decode([prompt.tokens[position]])
        assert "\ufffd" in whole or whole == said  # a token may be a part of a character


def test_words_that_a_template_writes_too_are_found_where_they_are_contents():
    prompt = texts_of(TEMPLATE).of_messages(chat("turn", "system", "user assistant", "What?"))
    assert dropped(prompt) == "turnsystemuser assistant"
    assert left(prompt).count("system\n") == 2
    assert left(prompt).endswith("What?<end><turn>assistant")


@pytest.mark.parametrize("template", [REWRITING, LAST_ONLY])
def test_of_a_template_that_changes_contents_nothing_may_go(template: str):
    assert texts_of(template).of_messages(chat("so </think> it is", "more", "What?")).droppable == ()


def test_a_context_may_go_and_the_prompt_behind_it_not():
    texts = texts_of(TEMPLATE)
    prompt = texts.of_prompt(" What is it?", "The moon is old.")
    assert dropped(prompt) == "The moon is old."
    assert left(prompt) == " What is it?"
    assert texts.of_prompt(" What is it?").droppable == ()
    assert list(prompt.tokens) == KNOWN("The moon is old. What is it?")["input_ids"]


class Slow(PreTrainedTokenizerFast):
    """One without offsets."""

    is_fast = False


def test_without_offsets_nothing_may_go():
    slow = Slow(tokenizer_object=KNOWN.backend_tokenizer, chat_template=TEMPLATE)
    assert Texts(slow).of_messages(chat("The moon", "What?")).droppable == ()


def test_what_cannot_be_a_chat_is_refused():
    with pytest.raises(DataError, match="no chat template; send a prompt"):
        texts_of(None).of_messages(chat("What?"))
    with pytest.raises(DataError, match="no message; send one"):
        texts_of(TEMPLATE).of_messages([])
    with pytest.raises(DataError, match="half a surrogate pair at character 6"):
        texts_of(None).of_prompt("moon \ud83c", "a")
    with pytest.raises(DataError, match="half a surrogate pair"):
        texts_of(TEMPLATE).of_messages(chat("moon \ud83c"))
    with pytest.raises(DataError, match="refuses these messages: one turn only"):
        texts_of("{{ raise_exception('one turn only') }}").of_messages(chat("What?"))
