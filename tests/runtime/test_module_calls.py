"""What we do with modules that a host has changed: accelerate's offloading is the witness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from transformers import PreTrainedModel

from amoeba_plugin.runtime.module_calls import answering, input_device, is_offloaded, onloaded
from support.models import offloaded

TinyModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_fetched_once_for_many_calls(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ids = torch.arange(3, 9)[None]
    whole = tiny_model("llama")
    wanted = whole(ids).logits
    assert input_device(whole) == torch.device("cpu")
    assert not is_offloaded(whole)
    model = offloaded(tiny_model("llama"), where, tmp_path)
    assert is_offloaded(model)
    assert is_offloaded(model.model.layers[1])
    assert input_device(model) == torch.device("cpu")
    fetched: Counter[object] = Counter()
    fetch = AlignDevicesHook.pre_forward

    def counted(hook: AlignDevicesHook, module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        fetched[module] += hook.offload
        return fetch(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    linear = model.model.layers[1].mlp.down_proj
    with onloaded(model.model.layers[1].modules()):
        assert linear.weight.device == torch.device("cpu")
        for _ in range(3):
            assert torch.equal(model(ids).logits, wanted)
    assert linear.weight.device == torch.device("meta")
    assert fetched[linear] == 1
    assert fetched[model.model.layers[2].mlp.down_proj] == 3
    with pytest.raises(KeyError), onloaded(model.modules()):
        raise KeyError
    assert linear.weight.device == torch.device("meta")
    assert torch.equal(model(ids).logits, wanted)


def test_nothing_is_fetched_where_nothing_is_offloaded(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    before = model.lm_head.weight
    with onloaded(model.modules()):
        assert model.lm_head.weight is before


def test_another_answer_ends_with_its_block(tiny_model: TinyModel, tmp_path: Path) -> None:
    for model in (tiny_model("llama"), offloaded(tiny_model("llama"), "cpu", tmp_path)):
        layer, states = model.model.layers[0], torch.zeros(1)
        before = dict(vars(layer))
        with pytest.raises(KeyError), answering(layer, lambda states: states + 1):
            assert layer(states) == 1
            raise KeyError
        assert vars(layer) == before
