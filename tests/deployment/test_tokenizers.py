"""What engines trip over in a tokenizer is mended in a copy, and what they read otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from amoeba_plugin.deployment.tokenizers import mended, rendered, require_same_tokens, shipped_texts
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.testing.flows import save_subnet, tokenizer


@pytest.fixture
def subnet(tmp_path: Path) -> Path:
    directory = save_subnet(tmp_path / "subnet")
    GenerationConfig(eos_token_id=1).save_pretrained(directory)
    return directory


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_sound_tokenizer_is_left_where_it_is(subnet: Path, tmp_path: Path):
    assert mended(subnet, tmp_path / "copy") == (subnet, [])
    assert not (tmp_path / "copy").exists()


def test_byte_fallback_of_a_byte_level_bpe_goes_and_the_weights_are_links(subnet: Path, tmp_path: Path):
    described = json.loads((subnet / "tokenizer.json").read_text())
    change(subnet / "tokenizer.json", model={**described["model"], "byte_fallback": True})
    before = (subnet / "tokenizer.json").read_bytes()
    copy, told = mended(subnet, tmp_path / "copy")
    assert "byte_fallback is off" in " ".join(told)
    assert json.loads((copy / "tokenizer.json").read_text())["model"]["byte_fallback"] is False
    assert (copy / "model.safetensors").is_symlink()
    assert (copy / "model.safetensors").samefile(subnet / "model.safetensors")
    assert (subnet / "tokenizer.json").read_bytes() == before
    texts = shipped_texts().all
    require_same_tokens(tokenizer(), texts, [AutoTokenizer.from_pretrained(copy)(text)["input_ids"] for text in texts])


def test_the_token_that_ends_turns_ends_generation(subnet: Path, tmp_path: Path):
    change(subnet / "tokenizer_config.json", eos_token="<turn>")
    change(subnet / "generation_config.json", eos_token_id=[2])
    copy, told = mended(subnet, tmp_path / "copy")
    assert told == ["<end> ends generation, as it ends every turn of the chat template"]
    assert AutoTokenizer.from_pretrained(copy).eos_token_id == 1
    assert GenerationConfig.from_pretrained(copy).eos_token_id == [1, 2]
    assert json.loads((copy / "config.json").read_text())["eos_token_id"] == 1


def test_without_a_template_there_is_no_turn_to_end(subnet: Path, tmp_path: Path):
    plain = tokenizer()
    plain.chat_template = None
    for file in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (subnet / file).unlink(missing_ok=True)
    plain.save_pretrained(subnet)
    change(subnet / "generation_config.json", eos_token_id=[2])
    assert mended(subnet, tmp_path / "copy") == (subnet, [])
    assert rendered(plain) is None


def test_other_tokens_are_refused_with_the_text():
    same = [tokenizer()(text)["input_ids"] for text in ("one", "two words")]
    require_same_tokens(tokenizer(), ["one", "two words"], same)
    with pytest.raises(DeploymentError, match=r"'two words' is \[3, 4\] to it and"):
        require_same_tokens(tokenizer(), ["one", "two words"], [same[0], [3, 4]])


def test_the_texts_are_fifty_and_of_many_kinds():
    texts = shipped_texts()
    assert len(set(texts.all)) == len(texts.all) == 50
    assert all(len(passage.split()) > 20 for passage in texts.passages)
    assert any(not text.isascii() for text in texts.texts)
    assert any(text.isspace() for text in texts.texts)
