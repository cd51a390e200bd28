"""torch.compile of an elastic model: a graph for each shape, none of which is used for another; and of its subnets."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.extraction.cut import extract
from support.models import random_tokens, tiny_llama
from support.strategies import uneven_strategy
from support.training import add_smol, make_elastic

TOKENS = random_tokens(61)
BACK_AND_FORTH = ("4x1", "2x1/2", "4x1", "2x1/2")
INDUCTOR = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # it imports torch.jit code that warns of itself
    pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++")), reason="inductor wants a C++ compiler"),
]


@torch.no_grad()
def require_eager(compiled: Any, model: Any, tolerance: float) -> None:
    expected = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected, rtol=0, atol=tolerance)


def per_layer_subnet() -> PreTrainedModel:
    model = tiny_llama()
    subnet = extract(ElasticModel(model, uneven_strategy(model)), "3x3/4")
    assert type(subnet).__name__ == "PerLayerLlamaForCausalLM"
    return subnet.eval()


def test_every_shape_has_a_graph_and_keeps_it():
    torch.compiler.reset()
    elastic = make_elastic()
    counter, graphs = CompileCounter(), []
    compiled = torch.compile(elastic.model, backend=counter, fullgraph=True)
    for shape in BACK_AND_FORTH:
        elastic.set_shape(shape)
        require_eager(compiled, elastic.model, tolerance=0)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]


def test_a_subnet_whose_layers_differ_is_one_graph():
    torch.compiler.reset()
    subnet = per_layer_subnet()
    require_eager(torch.compile(subnet, backend="eager", fullgraph=True), subnet, tolerance=0)


class TestInductor:
    """With code that is generated: minutes on a CPU."""

    pytestmark = INDUCTOR

    def test_an_elastic_model_back_and_forth(self):
        torch.compiler.reset()
        elastic = make_elastic()
        model = add_smol(elastic).eval()
        compiled = torch.compile(model, fullgraph=True)
        for shape in BACK_AND_FORTH:
            elastic.set_shape(shape)
            require_eager(compiled, model, tolerance=1e-4)

    @pytest.mark.parametrize("differ", [False, True])
    def test_a_subnet(self, differ: bool):
        torch.compiler.reset()
        subnet = per_layer_subnet() if differ else extract(make_elastic(), "2x1/2").eval()
        require_eager(torch.compile(subnet, fullgraph=True), subnet, tolerance=1e-4)
