"""Base models on disk, with a tokenizer and a text beside them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def save_with_text(model: PreTrainedModel, directory: Path) -> Path:
    """Save a model, a tokenizer of its size, and 12 rows of random text in ``text.jsonl``; return the directory."""
    model.save_pretrained(directory)
    size = model.config.vocab_size
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w1").save_pretrained(directory)
    rows = torch.randint(3, size, (12, 16), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join(json.dumps({"text": " ".join(f"w{number}" for number in row)}) + "\n" for row in rows)
    (directory / "text.jsonl").write_text(text)
    return directory
