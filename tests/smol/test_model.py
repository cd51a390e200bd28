"""A SMOL model under everything PEFT offers: several adapters, merging, unloading, copying."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from amoeba_plugin.errors import AdapterError, ConfigError, ShapeError
from amoeba_plugin.smol import SmolConfig, SmolLinear
from amoeba_plugin.smol.host import NoMatchingPeftModuleError
from amoeba_plugin.smol.model import count_layers

SHAPES = ["4x1", "3x1/2", "2x3/4"]


@pytest.mark.parametrize("combination", ["factors", "outputs"])
def test_merging_equals_the_adapter_at_every_shape(
    smol_model: Callable[..., PeftModel], tokens: Tensor, combination: str
) -> None:
    model = smol_model(combination=combination)
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    model.train()  # noise must not leak into a merge
    for shape in model.peft_config["default"].space:
        model.set_shape(shape)
        model.eval()
        expected = model(tokens).logits
        model.train()
        model.merge_adapter(safe_merge=shape.depth == 3)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            if name in base:
                torch.testing.assert_close(parameter, base[name], rtol=0, atol=1e-6)
    model.eval()
    expected = model(tokens).logits
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(unloaded(tokens).logits, expected, rtol=0, atol=1e-5)
    assert not hasattr(unloaded, "shape_router")
    assert not unloaded._forward_pre_hooks
    assert not [module for module in unloaded.modules() if isinstance(module, SmolLinear)]


def test_a_merged_model_keeps_its_shape(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model()
    model.set_shape("3x1/2")
    expected = model(tokens).logits
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged at shape 3x1/2, so 2x1 cannot be set; call unmerge_adapter"):
        model.set_shape("2x1")
    with pytest.raises(AdapterError, match="merged at shape 3x1/2, so 3x1/2 cannot be set"):
        model.set_shape("3x1/2", kept_layers=[1, 2, 3])
    model.set_shape("3x1/2")
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    model.set_shape("2x1")


def test_disabling_a_merged_adapter_frees_the_shape(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    model = smol_model()
    with model.disable_adapter():
        base = model(tokens).logits
    assert not torch.allclose(base, model(tokens).logits)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, base, rtol=0, atol=1e-5)
    model.set_shape("2x1")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT, for a tied target of any method
def test_merging_into_a_tied_weight_is_refused(
    base_model: Any, smol_config: Any, tokens: Tensor, tmp_path: Path
) -> None:
    base = base_model(tie_word_embeddings=True)
    model = get_peft_model(base, smol_config(target_modules=["q_proj", "lm_head"], init_weights=False)).eval()
    before = base.get_input_embeddings().weight.clone()
    expected = model(tokens).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="'lm_head' shares its weight with the input embeddings"):
            merge()
    assert torch.equal(base.get_input_embeddings().weight, before)
    model.to_lora(tmp_path)
    lora = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    torch.testing.assert_close(lora(tokens).logits, expected, rtol=0, atol=1e-5)


def test_excluded_modules_get_no_adapter(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(exclude_modules=["down_proj", "q_proj"])
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, SmolLinear)}
    assert adapted == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_biases_of_two_adapters_are_refused(smol_model: Callable[..., PeftModel], smol_config: Any) -> None:
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        smol_model(bias="all").add_adapter("b", smol_config(bias="smol_only"))


def test_safe_merge_refuses_what_is_not_finite(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.smol_experts["default"].B.fill_(float("nan"))
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_unmerging_what_is_not_merged_warns(smol_model: Callable[..., PeftModel]) -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        smol_model().base_model.model.model.layers[0].mlp.up_proj.unmerge()


def test_several_adapters_each_with_its_own_router(
    smol_model: Callable[..., PeftModel], smol_config: Callable[..., SmolConfig], tokens: Tensor, randomize: Any
) -> None:
    model = smol_model()
    alone = {}
    for shape in SHAPES:
        model.set_shape(shape)
        alone[shape] = model(tokens).logits
    model.add_adapter(
        "other", smol_config(r=2, depths=[4, 2], widths=["1", "1/2"], target_modules=["q_proj", "up_proj"])
    )
    randomize(model, seed=5, only="other")
    model.eval()
    assert all(not p.requires_grad for name, p in model.named_parameters() if ".other" in name)
    for shape in SHAPES:
        model.set_shape(shape)
        assert torch.equal(model(tokens).logits, alone[shape])
    model.set_adapter("other")
    assert str(model.shape) == SHAPES[-1]  # the shape is the model's
    with pytest.raises(ShapeError, match="active shape is 2x3/4, and this adapter was made for"):
        model(tokens)
    assert all(p.requires_grad == (".other" in name) for name, p in model.named_parameters() if "smol_" in name)
    with pytest.raises(ShapeError, match="3x1 is outside"):
        model.set_shape("3x1")
    model.set_shape("2x1/2")
    other = model(tokens).logits
    assert not torch.allclose(other, alone["2x3/4"])

    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ShapeError, match="2x3/4 is outside"):
        model.set_shape("2x3/4")
    assert str(model.base_model.router.weights("default").state.shape) == "2x1/2"  # nothing changed
    model.set_shape("2x1/2")
    both = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, both, rtol=0, atol=1e-5)
    model.unmerge_adapter()

    model.delete_adapter("default")
    assert list(model.base_model.router.smol_router) == ["other"]
    assert not [name for name, _ in model.named_parameters() if ".default" in name]
    torch.testing.assert_close(model(tokens).logits, other, rtol=0, atol=1e-5)


def test_layers_of_one_adapter_only(smol_model: Callable[..., PeftModel], smol_config: Any, tokens: Tensor) -> None:
    model = smol_model(target_modules=["q_proj"], layers_to_transform=[0])
    model.add_adapter("b", smol_config(target_modules=["up_proj"], exclude_modules=[], init_weights=False))
    assert len([m for m in model.modules() if isinstance(m, SmolLinear)]) == 1 + 4
    one = model(tokens).logits
    model.set_adapter("b")
    assert not torch.allclose(model(tokens).logits, one)


def test_a_regular_expression_that_matches_the_router(smol_model: Callable[..., PeftModel], smol_config: Any) -> None:
    model = smol_model(target_modules=".*q_proj")
    model.add_adapter("b", smol_config(target_modules=r".*(shape_router|v_proj)"))
    assert len([m for m in model.modules() if isinstance(m, SmolLinear)]) == 8


def test_modules_to_save_are_trained(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.requires_grad


def test_copies_are_independent_and_share_one_router(
    smol_model: Callable[..., PeftModel], tokens: Tensor, tmp_path: Path
) -> None:
    model = smol_model()
    model.set_shape("3x1/2")
    expected = model(tokens).logits
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(copied(tokens).logits, expected)
        routers = {id(m.router) for m in copied.modules() if isinstance(m, SmolLinear)}
        assert routers == {id(copied.base_model.model.shape_router)}
        copied.set_shape("4x1")
        assert str(model.shape) == "3x1/2"
        copied.train()(tokens)  # the copy's hook draws the copy's noise
        assert copied.base_model.router.weights("default").state.noise.abs().sum() > 0
        assert model.base_model.router.weights("default").state.noise.abs().sum() == 0
        assert not copied.unload()._forward_pre_hooks


def test_new_adapters_follow_the_mode_of_the_model(base_model: Any, smol_config: Any) -> None:
    model = get_peft_model(base_model(), smol_config(lora_dropout=0.1))
    assert not any(module.training for module in model.base_model.model.modules())
    model = get_peft_model(base_model().train(), smol_config(lora_dropout=0.1))
    assert all(module.training for module in model.modules())


def test_transformers_conv1d(tokens: Tensor, randomize: Any) -> None:
    base = nn.Sequential(Conv1D(6, 5), nn.Linear(6, 3))
    model = get_peft_model(
        base, SmolConfig(r=2, target_modules=["0", "1"], init_weights=False, widths=["1", "1/2"])
    ).eval()
    model.set_shape("1x1/2")
    x = torch.randn(4, 5)
    expected = model(x)
    assert model.base_model.model[0].get_delta_weight("default").shape == (6, 5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_modules": ["nothing"]},
            NoMatchingPeftModuleError,
            r"not found.*Linear layers of this model: \['down_proj",
        ),
        ({"target_modules": []}, NoMatchingPeftModuleError, r"Linear layers of this model: \['down_proj"),
        ({"target_modules": ["embed_tokens"]}, TypeError, "Currently, only `torch.nn.Linear`"),
        ({"num_layers": 6}, AdapterError, "for a model with 6 layers, but the model has 4"),
        ({"depths": [5]}, ConfigError, "depth 5 exceeds the model's 4 layers; lower depths$"),
    ],
)
def test_configs_that_do_not_fit_the_model(
    base_model: Any, smol_config: Any, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(base_model(), smol_config(**fields))


def test_a_model_without_a_number_of_layers() -> None:
    base = nn.Sequential(nn.Linear(3, 3))
    assert count_layers(base) is None
    with pytest.raises(AdapterError, match=r"depths=\[2\]: the router needs the number of layers.*set num_layers"):
        get_peft_model(base, SmolConfig(depths=[2], target_modules=["0"]))
    config = SmolConfig(depths=[2], num_layers=3, target_modules=["0"])
    assert str(get_peft_model(nn.Sequential(nn.Linear(3, 3)), config).shape) == "2x1"
    assert str(get_peft_model(nn.Sequential(nn.Linear(3, 3)), SmolConfig(target_modules=["0"])).shape) == "1x1"


def test_a_model_that_has_a_shape_router() -> None:
    base = nn.Module()
    base.shape_router, base.linear = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(AdapterError, match="'shape_router' of its own"):
        get_peft_model(base, SmolConfig(target_modules=["linear"]))


def test_mixed_batches_are_refused(smol_model: Callable[..., PeftModel], tokens: Tensor) -> None:
    with pytest.raises(AdapterError, match="no mixed batches"):
        smol_model()(tokens, adapter_names=["default", "__base__"])


def test_an_unloaded_model_has_no_router(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model()
    model.unload()
    with pytest.raises(AdapterError, match="no SMOL adapter any more"):
        model.set_shape("4x1")


def test_status_is_regular(smol_model: Callable[..., PeftModel]) -> None:
    model = smol_model()
    status = model.get_model_status()
    assert status.peft_types == {"default": "SMOL"}
    assert status.num_adapter_layers == 28 + 1  # the router counts as one
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_adapters_are_not_added_up(smol_model: Callable[..., PeftModel]) -> None:
    with pytest.raises(AdapterError, match="write each at one shape as a LoRA"):
        smol_model().add_weighted_adapter(["default"], [1.0], "sum")
