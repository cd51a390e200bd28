"""SmoothQuant and AWQ on subnets: exact, or refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY, AWQMapping
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.utils import DEFAULT_SMOOTHQUANT_MAPPINGS, MAPPINGS_REGISTRY
from llmcompressor.pipelines.cache import IntermediatesCache, IntermediateValue
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.subnet_config import config_for
from amoeba_plugin.errors import ArchitectureError, RecipeError
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.modifiers.smoothing import complete_tables, require_outputs_kept
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.recipes.run import run_recipe
from amoeba_plugin.testing.random_models import random_model
from support.architectures import CONFIGS
from support.models import logits, save_base

WITHOUT_TABLE = {("SmoothQuantModifier", name) for name in ("gpt_neox", "opt", "olmo2")} | {
    ("AWQModifier", name) for name in ("gpt_neox", "opt")
}
KINDS: dict[str, Any] = {"SmoothQuantModifier": SmoothQuantModifier, "AWQModifier": AWQModifier}
QUANTIZED = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A16").resolve_quantization_config()


def config_of_kind(model_type: str, kind: str) -> PretrainedConfig:
    config, adapter = AutoConfig.for_model(**CONFIGS[model_type]), architecture_for(model_type)
    if kind == "stock":
        return config
    whole = {group.name: group.units for group in adapter.channel_groups(config)}
    half = {name: units // 2 for name, units in whole.items()}
    lost = {} if kind == "sizes" else {1: kind}
    sizes = [half, whole, whole] if kind == "sizes" else [whole] * 3
    return config_for(adapter, config, LayerSizes(range(3), sizes, lost))


def require(modifier: Any, model_type: str, kind: str = "stock") -> None:
    require_outputs_kept(modifier, [QUANTIZED], config_of_kind(model_type, kind), architecture_for(model_type))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_is_smoothed_exactly_or_refused(model_type: str, name: str) -> None:
    for kind in ("stock", "sizes"):
        if (name, model_type) in WITHOUT_TABLE:
            with pytest.raises(ArchitectureError, match="it finds no modules to smooth in a .*mappings"):
                require(KINDS[name](), model_type)
        else:
            require(KINDS[name](), model_type, kind)
    if model_type == "llama":  # its tables name both
        for part in ("attention", "mlp"):
            with pytest.raises(ArchitectureError, match="finds no modules to smooth in a PerLayer"):
                require(KINDS[name](), model_type, part)


def test_what_the_hosts_tables_have_wrong_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAPPINGS_REGISTRY, "Gemma2ForCausalLM", DEFAULT_SMOOTHQUANT_MAPPINGS)
    monkeypatch.delitem(AWQ_MAPPING_REGISTRY, "MixtralForCausalLM")
    monkeypatch.delitem(MAPPINGS_REGISTRY, "PerLayerQwen3MoeForCausalLM")
    for modifier, model_type, kind in (
        (SmoothQuantModifier(), "gemma2", "stock"),
        (AWQModifier(), "mixtral", "stock"),
        (SmoothQuantModifier(), "qwen3_moe", "sizes"),
    ):
        with pytest.raises(ArchitectureError, match="post_attention_layernorm is taken to be read by .* alone, which"):
            require(modifier, model_type, kind)
        assert modifier.mappings is None
    complete_tables()
    require(SmoothQuantModifier(), "gemma2")


def test_mappings_of_ones_own_are_tried_too() -> None:
    qkv, norm = ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"
    require(SmoothQuantModifier(mappings=[[qkv, norm]]), "llama")
    require(SmoothQuantModifier(mappings=[[["re:.*fc1$"], "re:.*layers.*final_layer_norm$"]]), "opt")
    require(AWQModifier(mappings=[AWQMapping(norm, qkv)]), "mixtral")
    with pytest.raises(ArchitectureError, match="input_layernorm is taken to be read by k_proj, q_proj alone"):
        require(SmoothQuantModifier(mappings=[[qkv[:2], norm]]), "llama")


def test_a_recipe_is_refused_with_the_model_that_its_subnet_will_be() -> None:
    text = """
select_stage: {a_modifiers: {DepthShrinkingModifier: {min_depth: 2, granularity: sublayer}}}
extract_stage: {b_modifiers: {SubnetExtractionModifier: {shape: 3}}}
quantize_stage: {c_modifiers: {SmoothQuantModifier: {}, QuantizationModifier: {targets: [Linear], scheme: W8A8}}}
"""
    config = AutoConfig.for_model(**CONFIGS["llama"])
    with pytest.raises(ArchitectureError, match="line 4: SmoothQuantModifier: it finds no modules"):
        plan_recipe(text).against(config)
    plan_recipe(text.replace(", granularity: sublayer", "")).against(config)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_awq_is_refused_where_the_host_would_fail_in_the_end(tmp_path: Path) -> None:
    awq = {"AWQModifier": {}, "QuantizationModifier": {"targets": ["Linear"], "scheme": "W4A16"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"a_stage": {"b_modifiers": awq}}, sort_keys=False))
    with pytest.raises(RecipeError, match=r"my.yaml, line 3: AWQModifier: .* accelerator"):
        run_recipe(str(tmp_path / "my.yaml"), str(tmp_path / "absent"), None, tmp_path / "out")
    with pytest.raises(RuntimeError, match="accelerator"):  # the host's, which no longer fails once this does not
        IntermediatesCache([{"states": IntermediateValue(torch.zeros(1), None)}], None).pin_memory(0)


@pytest.mark.parametrize(("model_type", "allocation"), [("gemma2", "uniform"), ("mixtral", "global")])
@pytest.mark.usefixtures("fresh_session")
def test_a_smoothed_subnet_computes_what_it_did(model_type: str, allocation: str, tmp_path: Path) -> None:
    base = save_base(random_model(CONFIGS[model_type]), tmp_path / "base")
    rows = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(3)).tolist()
    Dataset.from_list([{"input_ids": row} for row in rows]).save_to_disk(str(tmp_path / "data"))
    found = []
    for name, smoothing in (("plain", {}), ("smooth", {"SmoothQuantModifier": {"smoothing_strength": 0.8}})):
        stages = {
            "a_stage": {
                "a_modifiers": {"WidthShrinkingModifier": {"widths": ["1", "3/4"], "allocation": allocation}},
                "b_modifiers": {"SubnetExtractionModifier": {"shape": "4x3/4"}},
            }
        }
        if smoothing:
            stages["b_stage"] = {"c_modifiers": smoothing}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(stages, sort_keys=False))
        options = RunOptions(num_samples=8, max_seq_length=16, dtype="float32")
        out = run_recipe(str(recipe), str(base), str(tmp_path / "data"), tmp_path / name, options).directory
        found.append(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=allocation == "global"))
    plain, smooth = found
    norms = [each.model.layers[0].input_layernorm.weight for each in found]
    assert not torch.allclose(*norms, rtol=0.1)  # it did something
    torch.testing.assert_close(logits(smooth), logits(plain), atol=1e-4, rtol=0)
