"""A model that takes images too is refused with lines that give its text model, and these lines work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)
from typer.testing import CliRunner

from amoeba_plugin.cli import app
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.architectures.gemma import Gemma
from amoeba_plugin.models.registry import TEXT_ALONE, architecture_of
from support.models import logits, random_elastic

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": 97, "sliding_window": 5,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture
def gemma3(tmp_path: Path) -> Path:
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma3")
    return tmp_path / "gemma3"


def test_the_way_to_the_text_model_is_told_and_leads_there(gemma3: Path, tmp_path: Path):
    whole = AutoModelForImageTextToText.from_pretrained(gemma3).eval()
    with pytest.raises(ArchitectureError, match="its text model, 'gemma3_text', is: save that alone") as caught:
        architecture_of(whole.config)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForImageTextToText": AutoModelForImageTextToText}
    assert str(caught.value).endswith(TEXT_ALONE)
    exec(TEXT_ALONE, names | {"MODEL": gemma3, "TEXT": tmp_path / "text"})  # noqa: S102  # what the message says
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert isinstance(architecture_of(text.config), Gemma)
    assert logits(text).equal(logits(whole, torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(5))))
    random_elastic(text)


def test_the_command_tells_it_too(gemma3: Path):
    result = CliRunner().invoke(app, ["loads", "2x1", "--model", str(gemma3), "--flow", "vllm"])
    assert result.exit_code == 2
    assert "text.save_pretrained(TEXT)" in result.stderr
