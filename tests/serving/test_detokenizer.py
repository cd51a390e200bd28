"""Text that grows token by token, against the text of all tokens at once, for tokenizers by bytes and by words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from amoeba_plugin.serving.detokenizer import Detokenizer
from amoeba_plugin.testing.flows import tokenizer

END = "<s>"


def by_words() -> PreTrainedTokenizerFast:
    """Return one as SentencePiece's: pieces with their spaces in front, and bytes of what it does not know."""
    pieces = [END, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcé\n:Q", "▁a", "bc", "▁abc"]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc")]
    bpe = models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, byte_fallback=True)
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END)


TOKENIZERS = {"bytes": tokenizer(), "words": by_words()}
words = st.text(st.sampled_from("abc é\n:Q\U0001f642\u4e2d"), min_size=1, max_size=24)


def whole(known: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return known.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words)
def test_pieces_make_the_text_of_all_tokens_and_none_has_half_a_character(name: str, text: str):
    known = TOKENIZERS[name]
    tokens, detokenizer = known(text)["input_ids"], Detokenizer(known)
    shown = [detokenizer.push(token) for token in tokens]
    rest = detokenizer.finish()
    assert "".join([*shown, rest]) == detokenizer.text == whole(known, tokens)
    assert not any("\ufffd" in each for each in shown)
    assert rest == ""  # without stop strings nothing waits for the end


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words, st.lists(st.text(st.sampled_from("abc \n:Q"), min_size=1, max_size=4), min_size=1, max_size=4))
def test_stop_strings_end_a_text_and_no_part_of_one_was_shown(name: str, text: str, stops: list[str]):
    known = TOKENIZERS[name]
    tokens, detokenizer = known(text)["input_ids"], Detokenizer(known, stops)
    shown, full = "", whole(known, tokens)
    _, at = min(
        ((full.find(stop) + len(stop), full.find(stop)) for stop in stops if stop in full), default=(0, len(full))
    )
    for token in tokens:
        shown += detokenizer.push(token)
        assert full[:at].startswith(shown)
        if detokenizer.stopped:
            break
    assert detokenizer.stopped == any(stop in full for stop in stops)
    assert shown + detokenizer.finish() == detokenizer.text == full[:at]


def test_bytes_that_never_become_a_character_are_left_out():
    known = TOKENIZERS["bytes"]
    tokens = known("so \U0001f642")["input_ids"]
    detokenizer = Detokenizer(known)
    assert [detokenizer.push(token) for token in tokens[:-1]][-1] == ""
    assert detokenizer.finish() == ""
    assert detokenizer.text == "so "


def test_special_tokens_are_not_shown_and_hold_nothing_up():
    known = TOKENIZERS["words"]
    detokenizer = Detokenizer(known)
    start, *rest = [known.bos_token_id, *known("a bc")["input_ids"]]
    assert detokenizer.push(start) == ""
    assert "".join(detokenizer.push(token) for token in rest) == "a bc"
