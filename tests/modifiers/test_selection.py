"""What the modifiers of a recipe know of one another, from one run on a model to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompressor.core import reset_session
from transformers import AutoModelForCausalLM, PreTrainedModel

from amoeba_plugin.errors import ArchitectureError, ShapeError
from support.batches import token_dataset
from support.models import logits, save_base
from support.recipes import DEPTH, WIDTH, recipe, run

TinyModel = Callable[..., PreTrainedModel]


def shrunk(model: PreTrainedModel, shape: str, seed: int) -> PreTrainedModel:
    text = recipe(DEPTH | WIDTH, {"SubnetExtractionModifier": {"shape": shape}})
    reset_session()
    return run(model, text, token_dataset(seed))


@pytest.mark.usefixtures("fresh_session")
def test_a_run_after_one_that_failed_begins_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = save_base(tiny_model("llama", layers=6), tmp_path / "base")
    model, other = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    with pytest.raises(ShapeError, match="3x7/8 is outside the space"):
        shrunk(model, "3x7/8", seed=1)
    again, fresh = shrunk(model, "3x1/2", seed=2), shrunk(other, "3x1/2", seed=2)
    torch.testing.assert_close(logits(again), logits(fresh), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("fresh_session")
def test_a_decoder_whose_layers_cannot_run_alone_is_not_repaired(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def asked(model: PreTrainedModel, **fields: str) -> PreTrainedModel:
        model.register_forward_hook(lambda *_: None)
        depth = {"DepthShrinkingModifier": {"min_depth": 2, "selector": "last_layers", **fields}}
        reset_session()
        return run(model, recipe(depth, {"SubnetExtractionModifier": {"shape": "3x1"}}), token_dataset(1))

    base = save_base(tiny_model("llama"), tmp_path / "base")
    with caplog.at_level("WARNING"):
        subnet = asked(AutoModelForCausalLM.from_pretrained(base))
    assert "nothing is repaired: layers of a LlamaForCausalLM cannot be run one at a time" in caplog.text
    assert len(subnet.model.layers) == 3
    with pytest.raises(ArchitectureError, match="repair is impossible: layers of .*; set repair: none"):
        asked(AutoModelForCausalLM.from_pretrained(base), repair="least_squares")
