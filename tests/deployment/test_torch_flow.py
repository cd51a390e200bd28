"""The flow torch: it keeps what every flow must, and its elastic scheme is the elastic model."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.torch_flow import Torch
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.testing.flows import FlowConformance, promised
from support.checkpoints import save_random
from support.models import make_tiny_model


class TestTorch(FlowConformance):
    flow = Torch()
    holds = promised(Path(__file__).parents[2] / "README.md", flow.name)


def test_the_elastic_scheme_is_the_elastic_model_at_every_shape(tmp_path: Path):
    elastic, flow, tokens = save_random(make_tiny_model("llama"), tmp_path), Torch(), [5, 9, 31, 2, 77]
    with EngineProcess("torch", flow.command()) as engine:
        for shape in ("3x1/2", "4x1", "2x3/4"):
            path = str(tmp_path / "elastic")
            engine.ask("load", path=path, threads=1, context=64, batch=1, shape=shape)
            (row,) = engine.ask("log_probabilities", tokens=tokens, behind=[5]).value
            found = torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.float32)
            with elastic.active(shape) as model, torch.no_grad():
                expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_bf16_halves_the_file_and_nothing_else_is_deployed_of_an_elastic_model(tmp_path: Path):
    subnet, out = tmp_path / "subnet", tmp_path / "out"
    make_tiny_model("llama").save_pretrained(subnet)
    out.mkdir()
    export = Torch().export(subnet, "bf16", out)
    assert export.tensor_types == {"BF16": len(load_file(subnet / "model.safetensors"))}
    assert export.files["model.safetensors"] < 0.6 * (subnet / "model.safetensors").stat().st_size
    with pytest.raises(DeploymentError, match="runs an elastic checkpoint as it is"):
        Torch().export(subnet, "elastic", out)
