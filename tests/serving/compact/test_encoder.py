"""An encoder of its own reads prompts: what it makes of its tokens goes to the model's, by the characters of both."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5Model
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.compact.encoder import EncoderFeatures, load_encoder
from amoeba_plugin.serving.compact.files import load_compact
from amoeba_plugin.serving.compact.heads import Choices, ScoreHead
from amoeba_plugin.serving.compact.reader import CompactModel
from amoeba_plugin.serving.compact.spans import mapped, spans_of
from amoeba_plugin.serving.compact.tune import Asked, tune_decisions
from amoeba_plugin.serving.feasible import SHARES, Prompt
from amoeba_plugin.serving.reading import kept_positions
from amoeba_plugin.testing.flows import tokenizer
from support.elastic_files import write_elastic
from support.questions import write_questions

WORDS = tokenizer()  # of the elastic model: a byte-level BPE
TEXT = "The moon is old, and \u00e9t\u00e9 is na\u00efve: \u6708\u4eae 1234 \U0001f642.\n\n  So it is."
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(TEXT.split()), max_size=30).map(" ".join))


def wordpiece() -> PreTrainedTokenizerFast:
    """Return a WordPiece that knows lower-case words alone, without accents, as BERT's does."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    pieces.train_from_iterator(shipped_texts().passages, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT, which reads 32 tokens at a time."""
    directory, words = tmp_path_factory.mktemp("bert"), wordpiece()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(bert: Path) -> EncoderFeatures:
    return load_encoder(str(bert), WORDS)


def offsets(words: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    found = words(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


@given(texts)
def test_the_characters_of_tokens_are_those_that_the_tokenizer_says(text: str):
    ids, expected = offsets(WORDS, text)
    found, spans = spans_of(WORDS, [0, *ids, 1])
    assert found == text
    assert (spans[0], spans[-1]) == ((0, 0), (len(text), len(text)))
    assert spans[1:-1] == expected


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=30))
def test_tokens_in_any_order_have_characters_of_their_text(tokens: list[int]):
    text, spans = spans_of(WORDS, tokens)
    assert len(spans) == len(tokens)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)


@settings(max_examples=60, deadline=None)
@given(texts)
def test_every_token_gets_what_the_encoders_tokens_over_its_characters_have(text: str):
    ids, spans = offsets(WORDS, text)
    _, held = offsets(WORDPIECE, text)
    values = torch.randn(len(held), 3, generator=torch.Generator().manual_seed(len(held)))
    found = mapped(values, held, spans)
    assert found.shape == (len(ids), 3)
    for row, (start, end) in zip(found, spans, strict=True):
        over = [each for each, (a, b) in zip(values, held, strict=True) if max(a, start) < min(b, end)]
        before = [each for each, (a, _) in zip(values, held, strict=True) if a < start]
        expected = torch.stack(over).mean(0) if over else [*values[:1], *before][-1] if held else torch.zeros(3)
        torch.testing.assert_close(row, expected)


WORDPIECE = wordpiece()


def test_the_encoder_reads_what_transformers_would_in_pieces_as_long_as_it_can(encoder: EncoderFeatures, bert: Path):
    model, words = AutoModel.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    text = " ".join([TEXT] * 4)
    values, held = encoder.read(text)
    ids, expected = offsets(words, text)
    assert held == expected
    assert len(ids) > 60
    for at in range(0, len(ids), 30):
        piece = torch.tensor([[words.cls_token_id, *ids[at : at + 30], words.sep_token_id]])
        with torch.no_grad():
            hidden = model(piece).last_hidden_state[0, 1:-1]
        torch.testing.assert_close(values[at : at + 30], hidden)
    features = encoder(WORDS(text)["input_ids"])
    torch.testing.assert_close(features, mapped(values, held, offsets(WORDS, text)[1]))
    assert encoder([]).shape == (0, 24)
    assert not encoder([0, 1]).any()  # special tokens alone are no text


@settings(max_examples=30, deadline=None)
@given(text=texts.filter(lambda text: len(WORDS(text)["input_ids"]) > 2), seed=st.integers(0, 9))
def test_what_stays_of_a_prompt_is_in_its_order_and_all_of_it_at_the_whole_share(
    encoder: EncoderFeatures, text: str, seed: int
):
    torch.manual_seed(seed)
    reader = CompactModel(encoder, ScoreHead(encoder.size), None, Choices((), ()))
    tokens = WORDS(text)["input_ids"]
    droppable = range(len(tokens) - 1)
    scores = reader(Request(tokens, droppable=droppable)).scores
    assert len(scores) == len(tokens)
    for share in SHARES:
        count = Prompt(len(tokens), len(droppable)).kept(share)
        kept = kept_positions(len(tokens), droppable, scores, count)
        assert kept == sorted(set(kept))
        assert len(kept) == count
        assert kept[-1] == len(tokens) - 1
        gone = [scores[each] for each in droppable if each not in kept]
        assert not gone or max(gone) <= min(scores[each] for each in kept[:-1]) or len(kept) == 1
    assert kept_positions(len(tokens), droppable, scores, Prompt(len(tokens), len(droppable)).kept(Fraction(1))) == [
        *range(len(tokens))
    ]


def test_the_command_tunes_on_an_encoder_and_only_that_one_is_loaded_again(bert: Path, tmp_path: Path):
    live = write_elastic(tmp_path)
    data = write_questions(tmp_path / "questions.jsonl", 14, context="A story of")
    command = [
        "tune-decisions",
        str(tmp_path / "elastic"),
        "--questions",
        data,
        "--shots",
        "2",
        "--shapes",
        "4x1,2x1/2",
    ]
    done = CliRunner().invoke(app, [*command, "--encoder", str(bert), "-o", str(tmp_path / "compact")])
    assert done.exit_code == 0, done.output
    words = AutoTokenizer.from_pretrained(tmp_path / "base")
    model, about = load_compact(tmp_path / "compact", live, words)
    assert about.encoder is not None
    assert (about.encoder.name, about.encoder.revision, about.layers, about.size) == (str(bert), None, None, 24)
    assert isinstance(model.features, EncoderFeatures)
    prompt = words("A story of 3\nWhat is 3?\nAnswer:")["input_ids"]
    first = model(Request(prompt, droppable=range(4)))
    assert len(set(first.scores)) > 1
    assert (
        first.scores == load_compact(tmp_path / "compact", live, words)[0](Request(prompt, droppable=range(4))).scores
    )
    with pytest.raises(ArtifactError, match="which reads texts; hand over the elastic model's tokenizer"):
        load_compact(tmp_path / "compact", live)
    weights = load_file(bert / "model.safetensors")
    try:
        save_file({name: each * 1.01 for name, each in weights.items()}, bert / "model.safetensors", {"format": "pt"})
        with pytest.raises(ArtifactError, match="is not the encoder that the compact model was made with"):
            load_compact(tmp_path / "compact", live, words)
    finally:
        save_file(weights, bert / "model.safetensors", {"format": "pt"})
    load_compact(tmp_path / "compact", live, words)


def test_weights_that_are_made_up_at_loading_are_no_part_of_an_encoder(bert: Path, tmp_path: Path):
    weights = load_file(bert / "model.safetensors")
    shutil.copytree(bert, tmp_path / "bare")
    bare = {name: each for name, each in weights.items() if "pooler" not in name}
    assert len(bare) < len(weights)
    save_file(bare, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    torch.manual_seed(1)
    first = load_encoder(str(tmp_path / "bare"), WORDS)
    torch.manual_seed(2)
    again = load_encoder(str(tmp_path / "bare"), WORDS, first.record)
    assert torch.equal(first([5, 6, 7]), again([5, 6, 7]))
    bare.pop(next(name for name in bare if "layer.1" in name))
    save_file(bare, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="lacks 1 weights, such as encoder.layer.1"):
        load_encoder(str(tmp_path / "bare"), WORDS)


@pytest.mark.parametrize("named", ["some/encoder", "some/encoder@refs/pr/8"])
def test_an_encoder_of_the_hub_is_kept_by_the_commit_that_was_loaded(
    named: str, bert: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def model(name: str, revision: str | None, **options: object) -> object:
        found, told = load(bert, **options)
        found.config._commit_hash = "abc123"
        asked.append((name, revision))
        return found, told

    load, words = AutoModel.from_pretrained, AutoTokenizer.from_pretrained
    monkeypatch.setattr("amoeba_plugin.serving.compact.encoder.require_answering", lambda name: None)
    monkeypatch.setattr(AutoModel, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, revision: words(bert))
    record = load_encoder(named, WORDS).record
    assert (record.name, record.revision) == ("some/encoder", "abc123")
    load_encoder(record.named, WORDS, record)
    assert asked == [("some/encoder", named.partition("@")[2] or None), ("some/encoder", "abc123")]


def test_what_is_no_encoder_is_refused_before_the_elastic_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_elastic(tmp_path)
    data = write_questions(tmp_path / "questions.jsonl", 14)
    monkeypatch.setattr("amoeba_plugin.serving.compact.tune.load_elastic", pytest.fail)
    small = T5Config(vocab_size=len(WORDPIECE), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(small).save_pretrained(tmp_path / "t5")
    WORDPIECE.save_pretrained(tmp_path / "t5")
    for name, words in (
        ("nowhere/at-all", "cannot be loaded: there is no such directory, and as a hub id"),
        (str(tmp_path / "nothing"), "cannot be loaded: there is no such directory"),
        (str(tmp_path / "t5"), "is an encoder with a decoder; give an encoder alone"),
    ):
        with pytest.raises(ArtifactError, match=words):
            tune_decisions(tmp_path / "elastic", tmp_path / "compact", Asked(data, encoder=name))
        assert not (tmp_path / "compact").exists()
