"""What the modifiers of a recipe know of one another, from one run on a model to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from test_modifiers import DEPTH, WIDTH, logits, recipe, save_base
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.errors import ShapeError

TinyModel = Callable[..., PreTrainedModel]


def run(model: PreTrainedModel, shape: str, seed: int) -> PreTrainedModel:
    rows = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 16} for row in rows])
    text = recipe(DEPTH | WIDTH, {"SubnetExtractionModifier": {"shape": shape}})
    reset_session()
    found: PreTrainedModel = oneshot(
        model=model, recipe=text, dataset=data, num_calibration_samples=8, max_seq_length=16
    )
    return found


@pytest.mark.usefixtures("fresh_session")
def test_a_run_after_one_that_failed_begins_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = save_base(tiny_model("llama", layers=6), tmp_path / "base")
    model, other = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    with pytest.raises(ShapeError, match="3x7/8 is outside the space"):
        run(model, "3x7/8", seed=1)
    again, fresh = run(model, "3x1/2", seed=2), run(other, "3x1/2", seed=2)
    torch.testing.assert_close(logits(again), logits(fresh), atol=1e-4, rtol=0)
