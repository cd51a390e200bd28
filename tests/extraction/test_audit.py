"""A cut that silently did nothing is an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedModel

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.extraction.audit import audit_sizes, require_sizes
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.architectures.llama import LlamaFamily
from amoeba_plugin.models.registry import architecture_for
from support.models import random_elastic

TinyModel = Callable[..., PreTrainedModel]


def test_sizes_are_listed_for_every_layer(tiny_model: TinyModel) -> None:
    elastic = random_elastic(tiny_model("llama"))
    subnet, asked = extract(elastic, "2x3/4"), LayerSizes((1, 3), [{"attention": 3, "mlp": 96}] * 2)
    sizes = audit_sizes(subnet.model.layers, architecture_for("llama"), elastic.config, asked)
    assert {(each.path, each.side, each.achieved) for each in sizes} == {
        ("self_attn.q_proj", "rows", 96),
        ("self_attn.k_proj", "rows", 48),
        ("self_attn.v_proj", "rows", 48),
        ("self_attn.o_proj", "columns", 96),
        ("mlp.gate_proj", "rows", 96),
        ("mlp.up_proj", "rows", 96),
        ("mlp.down_proj", "columns", 96),
    }
    assert [each.layer for each in sizes] == [0] * 7 + [1] * 7
    assert all(each.requested == each.achieved for each in sizes)


def test_every_linear_of_another_size_is_named(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    adapter, whole = architecture_for("llama"), {"attention": 4, "mlp": 128}
    require_sizes(model.model.layers, adapter, model.config, LayerSizes(range(4), [whole] * 4))
    other = LayerSizes(range(4), [whole, whole, whole | {"mlp": 64}, whole])
    with pytest.raises(ArchitectureError, match=r"layer 2, mlp.gate_proj: 64 rows asked for, 128 there; .*_proj"):
        require_sizes(model.model.layers, adapter, model.config, other)


def test_a_cut_that_did_nothing_is_an_error(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host exchanged the linears, and a configuration forgets a field: both ends agree on the wrong size."""
    elastic, stated = random_elastic(tiny_model("llama")), LlamaFamily.subnet_config

    def forgetful(self: Any, config: Any, kept_layers: Any, units: Any, biased: Any = frozenset()) -> Any:
        return stated(self, config, kept_layers, {"attention": 4, "mlp": 128}, biased)

    for layer in elastic.layers:
        for path, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
                plain.weight = linear.weight
                layer.set_submodule(path, plain)
    monkeypatch.setattr(LlamaFamily, "subnet_config", forgetful)
    with pytest.raises(ArchitectureError, match=r"layer 0, self_attn.q_proj: 64 rows asked for, 128 there"):
        extract(elastic, "4x1/2")
