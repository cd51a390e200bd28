"""Fixtures of all rooms; what makes them is in ``support``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import settings
from torch import Tensor
from transformers import PreTrainedModel

from support.batches import make_random_batches, token_dataset
from support.models import make_tiny_model, save_base

settings.register_profile("any machine", deadline=None)  # how long an example takes depends on who else computes
settings.load_profile("any machine")


@pytest.fixture
def fresh_session() -> Iterator[None]:
    """Let no recipe of another test be left in llm-compressor's session, nor one of this test."""
    from llmcompressor.core import reset_session  # seconds, which most tests do not need

    reset_session()
    yield
    reset_session()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(model_type, seed=0, layers=4, **overrides)``: see :func:`support.models.make_tiny_model`."""
    return make_tiny_model


@pytest.fixture(scope="session")
def random_batches() -> Callable[..., list[dict[str, Tensor]]]:
    """``random_batches(count=3, rows=2, ...)``: see :func:`support.batches.make_random_batches`."""
    return make_random_batches


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a directory with a tiny Llama and its tokenizer."""
    return save_base(make_tiny_model("llama"), tmp_path / "base")


@pytest.fixture
def data() -> Dataset:
    """Return the rows that a recipe calibrates and trains with."""
    return token_dataset()
