"""What the package assumes of the versions of its hosts: that the installed ones look like it, and what it answers for
others, whose side of it is put in their place.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import amoeba_plugin
from amoeba_plugin.runtime import compat

PACKAGE = Path(amoeba_plugin.__file__).parent
PROJECT = PACKAGE.parent / "pyproject.toml"


def installed(package: str) -> tuple[int, ...]:
    """Return the first two numbers of a host's version."""
    return tuple(int(number) for number in importlib.metadata.version(package).split(".")[:2])


def tiny_llama(**fields: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 11}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes | fields)).eval()


class TestTheModule:
    def test_importing_it_imports_no_host(self):
        program = (
            "import sys, amoeba_plugin.runtime.compat; "
            "print([each for each in ('torch', 'transformers', 'peft', 'llmcompressor') if each in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_nothing_else_of_the_package_tells_versions_apart(self):
        """Elsewhere no host's number is looked at, and no import may fail."""
        apart = re.compile(r"\w+\.__version__|except \(?(?:\w+, )*(?:ImportError|ModuleNotFoundError)")
        found = {path.name for path in PACKAGE.rglob("*.py") if apart.search(path.read_text())}
        assert found == {Path(compat.__file__).name}


class TestTransformers:
    def test_layers_have_configurations_of_their_own_since_5_14(self, monkeypatch: pytest.MonkeyPatch):
        since = tuple(map(int, compat.PER_LAYER_CONFIG_SINCE.split(".")))
        assert compat.has_per_layer_config() == (installed("transformers") >= since)
        if compat.has_per_layer_config():
            config = LlamaConfig(num_hidden_layers=2, intermediate_size=8)
            config.per_layer_config = {1: {"intermediate_size": 4}}
            assert [each.intermediate_size for each in config.per_layer_config] == [8, 4]
            assert config.is_heterogeneous
        monkeypatch.setattr(transformers, "PretrainedConfig", type("PretrainedConfig", (), {}))
        assert not compat.has_per_layer_config()

    def test_packed_experts_are_read_since_5_13(self, monkeypatch: pytest.MonkeyPatch):
        name = "transformers.integrations.compressed_tensors"
        assert compat.reads_packed_experts() == (installed("transformers") >= (5, 13))
        older = SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, older)  # the file without the class
        monkeypatch.setattr(transformers.integrations, "compressed_tensors", older, raising=False)
        assert not compat.reads_packed_experts()
        monkeypatch.setitem(sys.modules, name, None)  # no file
        monkeypatch.delattr(transformers.integrations, "compressed_tensors")
        assert not compat.reads_packed_experts()

    @torch.no_grad()
    def test_the_cache_is_called_as_the_model_calls_it(self):
        model = tiny_llama()
        name = compat.cache_name(model)
        assert name == ("cache" if installed("transformers") >= (5, 24) else "past_key_values")
        cache = DynamicCache(config=model.config)
        output = model(torch.tensor([[1, 2, 3]]), **{name: cache}, use_cache=True)
        assert getattr(output, name) is cache
        assert cache.get_seq_length() == 3

    def test_the_name_of_other_versions_is_found(self):
        class Renamed(nn.Module):
            def forward(self, input_ids: Any, cache: Any = None, **options: Any) -> None: ...

        class Older(nn.Module):
            def forward(self, input_ids: Any, past_key_values: Any = None, **options: Any) -> None: ...

        assert (compat.cache_name(Renamed()), compat.cache_name(Older())) == ("cache", "past_key_values")

    def test_attention_is_called_with_a_name_that_a_stand_in_takes(self):
        """``modeling_per_layer.py`` says the names for itself: it travels without this package."""
        from amoeba_plugin.models.modeling_per_layer import CACHE_NAMES

        asked: dict[str, Any] = {}
        model = tiny_llama()
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: asked.update(kwargs), with_kwargs=True
        )
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[1, 2]]), **{compat.cache_name(model): cache}, use_cache=True)
        assert [name for name, value in asked.items() if value is cache] == [compat.cache_name(model)]
        assert compat.cache_name(model) in CACHE_NAMES


class TestPeft:
    def test_the_versions_tested_are_those_that_may_be_installed(self, monkeypatch: pytest.MonkeyPatch):
        requirements = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
        assert "peft>=0.20,<0.22" in requirements
        assert compat.TESTED_PEFT == ("0.20", "0.21")
        assert compat.untested_peft() is None
        for version, expected in (("0.20.0", None), ("0.22.0", "0.22.0"), ("0.2.0", "0.2.0")):
            monkeypatch.setattr(peft, "__version__", version)
            assert compat.untested_peft() == expected

    def test_where_nothing_is_targeted_an_error_is_raised_that_is_caught(self, monkeypatch: pytest.MonkeyPatch):
        with pytest.raises(compat.no_match_error(), match="not found in the base model"):
            get_peft_model(tiny_llama(), LoraConfig(target_modules=["absent"]))
        assert (compat.no_match_error() is ValueError) == (installed("peft") < (0, 21))
        monkeypatch.setitem(sys.modules, "peft.utils.error", None)
        assert compat.no_match_error() is ValueError

    def test_trained_biases_are_saved_since_0_21(self, monkeypatch: pytest.MonkeyPatch):
        assert compat.saves_biases() == (installed("peft") >= (0, 21))
        monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=False)
        assert not compat.saves_biases()

    def test_biases_of_any_method_are_in_what_is_saved_where_it_says_so(self):
        from amoeba_plugin.smol import SmolConfig

        if not compat.saves_biases():
            pytest.skip("this PEFT does not save them, and SmolConfig refuses them")
        model = tiny_llama(attention_bias=True)
        wrapped = get_peft_model(model, SmolConfig(r=2, num_experts=2, target_modules=["q_proj"], bias="all"))
        saved = peft.get_peft_model_state_dict(wrapped)
        assert [name for name in saved if name.endswith("q_proj.bias") or name.endswith("base_layer.bias")]

    def test_a_tuner_runs_the_hooks_of_its_base(self, monkeypatch: pytest.MonkeyPatch):
        """PEFT 0.20 calls ``forward`` of the base, past its hooks; the router draws its noise in one."""
        from amoeba_plugin.smol import SmolConfig

        wrapped = get_peft_model(tiny_llama(), SmolConfig(r=2, num_experts=2, target_modules=["q_proj"]))
        monkeypatch.setattr(BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
        called: list[nn.Module] = []
        wrapped.base_model.model.register_forward_pre_hook(lambda module, args: called.append(module))
        wrapped(input_ids=torch.tensor([[1, 2]]))
        assert called == [wrapped.base_model.model]


class TestLlmCompressor:
    def test_what_is_saved_is_the_model_s_own_configuration(self, tmp_path: Path):
        """Since 0.14 the file of the model that was loaded is put in its place, unless the model has no name."""
        from llmcompressor.transformers.compression import compressed_tensors_utils

        resave = getattr(compressed_tensors_utils, "resave_config", None)
        assert (resave is not None) == (installed("llmcompressor") >= (0, 14))
        if resave is None:
            return
        whole = LlamaConfig(num_hidden_layers=4, dtype="float32")
        whole.save_pretrained(tmp_path / "whole")
        cut = LlamaConfig.from_pretrained(tmp_path / "whole")
        cut.num_hidden_layers, cut._name_or_path = 2, str(tmp_path / "whole")
        for kept, expected in ((False, 4), (True, 2)):
            directory = tmp_path / str(kept)
            cut.save_pretrained(directory)
            if kept:
                with compat.own_config_saved(cut):
                    resave(cut, directory)
            else:
                resave(cut, directory)
            assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == expected

    def test_the_name_comes_back(self):
        config = SimpleNamespace(_name_or_path="base")
        with pytest.raises(RuntimeError, match="stop"), compat.own_config_saved(config):
            assert config._name_or_path == ""
            raise RuntimeError("stop")
        assert config._name_or_path == "base"


def test_gradient_checkpointing_runs_a_layer_by_a_function_that_can_be_exchanged() -> None:
    model, run = tiny_llama().train(), []

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda layer, *args: run.append(layer) or function(layer, *args)

    compat.exchange_checkpointing(model, count)  # it has never been on
    model.gradient_checkpointing_enable()
    compat.exchange_checkpointing(model, count)
    model(torch.tensor([[1, 2]]))
    assert len(run) == len(model.model.layers)


def test_adapters_are_switched_as_the_host_does_and_what_is_frozen_stays_so() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config).eval()
    whole = model(tokens).logits
    with model.disable_adapter():
        expected = model(tokens).logits
    assert not torch.allclose(whole, expected)
    model.requires_grad_(False)
    compat.switch_adapters(model.modules(), on=False)
    assert torch.equal(model(tokens).logits, expected)
    compat.switch_adapters(model.modules(), on=True)
    assert torch.equal(model(tokens).logits, whole)
    assert not any(value.requires_grad for value in model.parameters())
