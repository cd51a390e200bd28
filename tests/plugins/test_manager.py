"""Hooks: what a stranger hands over is found by name, and a wrong name is answered with the right ones."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amoeba_plugin.deployment.flow import Point
from amoeba_plugin.deployment.registry import flow_named, point_named
from amoeba_plugin.deployment.search.asked import Asked
from amoeba_plugin.deployment.search.evaluators import Judge
from amoeba_plugin.deployment.search.problem import Choice, Problem
from amoeba_plugin.deployment.search.registry import evaluator_named, searcher_named
from amoeba_plugin.deployment.torch_flow import Torch
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.errors import ArchitectureError, PluginError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.architectures.llama import LlamaFamily
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.plugins.hooks import PROJECT, hookimpl
from amoeba_plugin.plugins.manager import collected, modules_named, plugin_manager
from amoeba_plugin.selection.activation_stats import ActivationStats
from amoeba_plugin.selection.depth.task import DepthSelector
from amoeba_plugin.selection.importance import Importance
from amoeba_plugin.selection.layerwise.task import Sensitivity
from amoeba_plugin.selection.objectives import Objective, PerTokenLoss
from amoeba_plugin.selection.registry import (
    depth_selector_named,
    importance_named,
    objective_named,
    repair_named,
    sensitivity_named,
)
from amoeba_plugin.selection.repair.width import Repair
from amoeba_plugin.serving.deciders import Decider, DeciderOptions
from amoeba_plugin.serving.registry import decider_named


class Stranger(LlamaFamily):
    model_types = ("strange",)


def smallest_first(stats: ActivationStats, weight: Tensor) -> Tensor:
    return -weight.float().abs().sum(dim=0)


@pytest.fixture
def install() -> Iterator[Callable[..., None]]:
    """Register plugins made of functions by hook name; they are gone after the test."""
    installed: list[Any] = []

    def install(name: str, **hooks: Callable[..., Any]) -> None:
        plugin = SimpleNamespace(**{hook: hookimpl(function) for hook, function in hooks.items()})
        plugin_manager().register(plugin, name)
        installed.append(plugin)

    yield install
    for plugin in installed:
        plugin_manager().unregister(plugin)


def test_hook_amoeba_architectures(install: Callable[..., None]) -> None:
    stranger = Stranger()

    def hook() -> Sequence[ArchitectureAdapter]:
        return (stranger,)

    install("their_package", amoeba_architectures=hook)
    assert architecture_for("strange") is stranger
    assert type(architecture_for("qwen3")) is LlamaFamily


def test_hook_amoeba_importances(install: Callable[..., None]) -> None:
    theirs = Importance("smallest", smallest_first, needs_statistics=False)

    def hook() -> Mapping[str, Importance]:
        return {"smallest": theirs}

    install("their_package", amoeba_importances=hook)
    assert importance_named("smallest") is theirs
    assert importance_named("flap").name == "flap"


def test_hook_amoeba_repairs(install: Callable[..., None]) -> None:
    theirs = Repair("cut", lambda weight, moments, kept: {count: weight[:, :count].double() for count in kept})

    def hook() -> Mapping[str, Repair]:
        return {"cut": theirs}

    install("their_package", amoeba_repairs=hook)
    assert repair_named("cut") is theirs
    assert repair_named("least_squares").name == "least_squares"


def test_hook_amoeba_objectives(install: Callable[..., None]) -> None:
    theirs = PerTokenLoss()

    def hook() -> Mapping[str, Objective]:
        return {"theirs": theirs}

    install("their_package", amoeba_objectives=hook)
    assert objective_named("theirs") is theirs
    assert objective_named("accuracy").larger_is_better


def test_hook_amoeba_depth_selectors(install: Callable[..., None]) -> None:
    theirs = DepthSelector("theirs", lambda task: DepthStrategy.whole(task.num_layers))

    def hook() -> Mapping[str, DepthSelector]:
        return {"theirs": theirs}

    install("their_package", amoeba_depth_selectors=hook)
    assert depth_selector_named("theirs") is theirs
    assert depth_selector_named("dynamic_program").options


def test_hook_amoeba_deployment_flows(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(Torch):
        name = "theirs"

    theirs = Theirs()
    install("their_package", amoeba_deployment_flows=lambda: {"theirs": theirs})
    assert point_named("theirs:bf16") == (theirs, Point("theirs", "bf16"))
    assert flow_named("torch").schemes
    monkeypatch.setattr("amoeba_plugin.deployment.registry.INTEGRATIONS", {"away": "./integrations/away"})
    with pytest.raises(PluginError, match=r"^away is not installed: pip install \./integrations/away$"):
        flow_named("away")
    with pytest.raises(PluginError, match=r"no deployment flow named 'nowhere'.*; not installed: away \("):
        flow_named("nowhere")


def test_hook_amoeba_searchers(install: Callable[..., None]) -> None:
    def theirs(problem: Problem) -> Choice:
        return problem.possible()[0]

    install("their_package", amoeba_searchers=lambda: {"first": theirs})
    assert searcher_named("first") is theirs
    assert searcher_named("hierarchical").__name__ == "hierarchical"


def test_hook_amoeba_evaluators(install: Callable[..., None]) -> None:
    def theirs(elastic: ElasticModel, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> Judge:
        raise NotImplementedError

    install("their_package", amoeba_evaluators=lambda: {"beauty": theirs})
    assert evaluator_named("beauty") is theirs
    assert evaluator_named("accuracy").__name__ == "accuracy"


def test_hook_amoeba_decisions(install: Callable[..., None]) -> None:
    def theirs(options: DeciderOptions) -> Decider:
        return lambda feasible: None

    install("their_package", amoeba_decisions=lambda: {"none": theirs})
    assert decider_named("none")(None) is None  # type: ignore[arg-type]


def test_hook_amoeba_sensitivities(install: Callable[..., None]) -> None:
    theirs = Sensitivity("by_name", lambda task: {}, "share", "nothing")
    install("their_package", amoeba_sensitivities=lambda: {"by_name": theirs})
    assert sensitivity_named("by_name") is theirs
    assert sensitivity_named("kl").name == "kl"


def test_hook_amoeba_commands(install: Callable[..., None]) -> None:
    def greet(name: str) -> None:
        """Greet."""

    install("their_package", amoeba_commands=lambda: {"greet": greet})
    assert collected("command", "amoeba_commands")["greet"] is greet


def test_every_hook_has_a_test_and_a_contract() -> None:
    specs = {
        name: each
        for module in modules_named("hooks")
        for name, each in vars(importlib.import_module(module)).items()
        if hasattr(each, f"{PROJECT}_spec")
    }
    assert specs
    assert {f"test_hook_{name}" for name in specs} <= globals().keys()
    assert all(inspect.getdoc(spec) for spec in specs.values())


def test_built_in_names() -> None:
    assert [importance_named(name).name for name in ("flap", "flap_ifv", "flap_wifn", "wanda", "magnitude")]
    assert [objective_named(name).name for name in ("loss", "perplexity", "accuracy")]
    assert {type(architecture_for(name)) for name in ("llama", "mistral", "qwen2", "qwen3")} == {LlamaFamily}


def test_an_unknown_name_is_answered_with_those_that_exist(install: Callable[..., None]) -> None:
    for misspelt in ("flab", "FLAP"):
        with pytest.raises(PluginError, match=f"no importance named '{misspelt}'. Did you mean 'flap'. Known: flap, "):
            importance_named(misspelt)
    install("their_package", amoeba_objectives=lambda: {"length": PerTokenLoss()})
    known = r"Known: accuracy, length \(from their_package\), loss, perplexity$"
    with pytest.raises(PluginError, match=rf"no objective named 'beauty'\. {known}"):
        objective_named("beauty")
    with pytest.raises(ArchitectureError, match="'gpt2' is not supported; supported are gemma2, .*llama, .*qwen2, "):
        architecture_for("gpt2")


def test_a_name_given_twice_is_refused_with_both_givers(install: Callable[..., None]) -> None:
    install("their_package", amoeba_importances=lambda: {"flap": Importance("flap", smallest_first)})
    with pytest.raises(PluginError, match="importance 'flap' is registered twice, by .* and by ") as raised:
        importance_named("wanda")
    assert "their_package" in str(raised.value)
    assert "amoeba_plugin.selection.builtin" in str(raised.value)


def test_a_plugin_that_fails_is_named(install: Callable[..., None]) -> None:
    """Also where an integration is asked for, which is not what is missing then."""

    def hook() -> Mapping[str, object]:
        raise ImportError("cannot import name 'gone'")

    install("their_package", amoeba_deployment_flows=hook)
    for name in ("llama-cpp", "torch", "nowhere"):
        with pytest.raises(
            PluginError, match=r"plugin their_package fails in amoeba_deployment_flows \(ImportError: .*gone"
        ):
            flow_named(name)


def test_a_plugin_with_a_misspelt_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(manager: pluggy.PluginManager, group: str) -> int:
        manager.register(SimpleNamespace(amoeba_importance=hookimpl(lambda: {})), "their_package")
        return 1

    monkeypatch.setattr(pluggy.PluginManager, "load_setuptools_entrypoints", load)
    with pytest.raises(PluginError, match="unknown hook"):
        plugin_manager.__wrapped__()
