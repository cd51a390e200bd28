"""Elastic checkpoints that earlier versions wrote: their logits are kept beside them, and every shape still gives them.

``before_rooms``: depths 4 to 2 with sublayers, widths 1 to 1/2, SMOL on three linears; written at commit f67eff6.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.extraction.checkpoint import extract_checkpoint

OLDER = Path(__file__).parent / "before_rooms"
LOGITS = load_file(OLDER / "logits.safetensors")
TOKENS = LOGITS.pop("tokens")


@torch.no_grad()
def test_every_shape_computes_what_it_did():
    elastic, peft_model = load_elastic(OLDER / "elastic")
    assert peft_model is not None
    assert {str(shape) for shape in elastic.space} == LOGITS.keys()
    for shape, expected in LOGITS.items():
        with elastic.active(shape):
            found = peft_model(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=lambda text, shape=shape: f"{shape}: {text}")


@pytest.mark.parametrize("shape", ["3x1/2", "2.5x3/4"])
@torch.no_grad()
def test_a_shape_is_cut_from_it(shape: str, tmp_path: Path):
    extract_checkpoint(OLDER / "elastic", shape, tmp_path / "subnet")
    subnet = AutoModelForCausalLM.from_pretrained(tmp_path / "subnet", trust_remote_code=True).eval()
    torch.testing.assert_close(subnet(TOKENS, use_cache=False).logits, LOGITS[shape], atol=1e-4, rtol=0)
