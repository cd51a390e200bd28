"""What a SMOL configuration accepts, and what it says when it does not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from amoeba_plugin.errors import AdapterError, ConfigError
from amoeba_plugin.smol import SmolConfig, host


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0: give a whole number"),
        ({"num_experts": 0, "top_k": 1}, "num_experts=0: give a whole number"),
        ({"top_k": 6}, "top_k=6 experts cannot be chosen from num_experts=5"),
        ({"router_hidden": 1.5}, "router_hidden=1.5"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0: a probability in \[0, 1\)"),
        ({"router_temperature": 0}, "router_temperature=0"),
        ({"router_temperature": float("nan")}, "router_temperature=nan"),
        ({"router_load_balancing": float("nan")}, "router_load_balancing=nan"),
        ({"router_load_balancing": -1}, "router_load_balancing=-1: the weight of a loss"),
        ({"combination": "sum"}, "combination='sum': choose one of factors, outputs"),
        ({"router_init": "depths"}, "router_init='depths': choose one of random, widths"),
        ({"router_init": "widths", "router_hidden": 1, "widths": ["1", "1/2"]}, "each of the 2 widths"),
        ({"router_nonlinearity": "elu"}, "choose one of none, relu"),
        ({"init_weights": "pissa"}, "init_weights='pissa': choose one of True, False, gaussian"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern gives 'q_proj' rank 0"),
        ({"bias": "some"}, "bias='some': choose one of none, all, smol_only, lora_only"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ({"target_modules": ".*q", "layers_pattern": "layers"}, "`layers_pattern` cannot be used"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
        ({"widths": ["1", "0"]}, r"widths=\['1', '0'\]: width 0"),
        ({"widths": ["half"]}, "'half' is no number"),
        ({"widths": "7/8"}, r"widths='7/8': give a list, such as \['1', '7/8'\]"),
        ({"depths": 4}, "depths=4: give a list of whole or half numbers"),
        ({"depths": ["4"]}, r"depths=\['4'\]: give a list of whole or half numbers"),
        ({"lora_alpha": "16"}, "lora_alpha='16': the scale of the updates"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj=None: the scale of the updates"),
        ({"init_lora_weights": "pissa"}, "init_weights='pissa': choose one of"),
        ({"widths": []}, "give a list with at least one width"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"depths": []}, "give at least one depth"),
        ({"depths": [0, 2]}, "each of at least 1 layer"),
        ({"depths": [5], "num_layers": 4}, "depth 5 exceeds the model's 4 layers"),
        ({"kept_layers": {"two": [0, 1]}}, "names the depth 'two'"),
        ({"kept_layers": {"2": [0]}}, "depth 2 keeps 2 layers, but kept_layers lists 1"),
        ({"depths": [1.25]}, "half a layer each"),
        ({"kept_layers": {"2": [0, "1.norm"]}}, "'1.norm' among the layers kept"),
        ({"kept_layers": {"2": [0, "1.mlp"]}}, "depth 2 keeps 2 layers, but kept_layers lists 1.5"),
        ({"kept_layers": {"2": [1, 0]}}, "list each index once, ascending"),
        ({"kept_layers": {"2": [0, 9]}, "num_layers": 4}, "names layer 9, but the model has layers 0 to 3"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SmolConfig(**fields)


def test_fields_of_a_script_for_lora_are_understood() -> None:
    assert SmolConfig(init_lora_weights=False, fan_in_fan_out=True) == SmolConfig(init_weights=False)
    assert SmolConfig(init_lora_weights="gaussian").init_weights == "gaussian"
    assert not {"init_lora_weights", "fan_in_fan_out"} & SmolConfig(init_lora_weights=True).to_dict().keys()


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(AdapterError, match="format version 99, but this package reads up to 1"):
        SmolConfig(format_version=99)


def test_space_is_exact_and_ordered() -> None:
    config = SmolConfig(depths=[2, 4, 3], widths=["0.5", "1", "7/8"], num_layers=4)
    assert config.widths == ["1", "7/8", "1/2"]
    assert str(config.space) == "depths {4, 3, 2} x widths {1, 7/8, 1/2}"


def test_space_needs_a_depth() -> None:
    with pytest.raises(ConfigError, match="the depths are unknown until the adapter is on a model"):
        _ = SmolConfig().space
    with pytest.raises(ConfigError, match="num_layers is unknown"):
        SmolConfig().kept(2)


def test_half_layers_are_depths_too() -> None:
    config = SmolConfig(depths=[4, 3.5, 2.5], num_layers=4, kept_layers={"2.5": [0, "2.attention", 3]})
    assert str(config.space) == "depths {4, 3.5, 2.5} x widths {1}"
    assert config.kept(2.5) == (0, "2.attention", 3)
    assert config.kept(3.5) == (0, 1, "2.mlp", 3)  # the default


def test_kept_layers_default_to_dropping_the_deepest_but_the_last() -> None:
    config = SmolConfig(depths=[6, 4, 1], num_layers=6, kept_layers={"4": [0, 2, 3, 5]})
    assert config.kept(6) == (0, 1, 2, 3, 4, 5)
    assert config.kept(4) == (0, 2, 3, 5)
    assert config.kept(3) == (0, 1, 5)
    assert config.kept(1) == (5,)


def test_round_trips(tmp_path: Path) -> None:
    config = SmolConfig(depths=[4, 2], widths=["1", "1/2"], kept_layers={2: [0, 3]}, num_layers=4, target_modules="x.*")
    config.save_pretrained(str(tmp_path))
    pickled = pickle.loads(pickle.dumps(config))  # noqa: S301  # bytes of our own
    for copied in (PeftConfig.from_pretrained(tmp_path), pickled, copy.deepcopy(config)):
        assert type(copied) is SmolConfig
        assert copied == config
        assert copied.peft_type.value == "SMOL"


def test_biases_that_peft_would_lose_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SAVES_BIASES", False)
    with pytest.raises(ConfigError, match="does not save them; take PEFT 0.21, or bias='none'"):
        SmolConfig(bias="smol_only")
    assert SmolConfig(bias="none").bias == "none"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"ensure_weight_tying": True},
            "SMOL has no ensure_weight_tying, which LoRA has; leave embed_tokens and lm_head",
        ),
        ({"use_dora": True}, "SMOL has no use_dora"),
        ({"layer_replication": [(0, 2)]}, "SMOL has no layer_replication, which LoRA has; leave it out"),
    ],
)
def test_what_lora_has_and_smol_lacks_is_refused_with_what_to_do(fields: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        SmolConfig(**fields)
    with pytest.raises(TypeError):
        SmolConfig(no_such_field=1)
