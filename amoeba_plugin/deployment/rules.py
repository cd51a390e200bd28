"""Whether an engine can load a subnet, before anything is spent on it.

What engines want is data, a file for each in ``engine_rules/``: ``read`` (the versions it was read in), ``schemes``
(those of compressed-tensors, or how many weights of a row share a scale), ``unquantized`` (schemes without scales), and
``rules``, which are conjunctive:

- ``check``: which test, a function of this module; ``value``: its parameter
- ``classes``: architectures in ``config.json`` that the rule is about; default all
- ``schemes``: schemes that the rule is about; default all, and none too
- ``level``: refuse (cannot be loaded) or warn (can, but not as one would think)
- ``says``: for the user: what is wrong, and what to do
- ``source``: where the rule was read
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from amoeba_plugin.deployment.registry import installed_flows
from amoeba_plugin.deployment.schemes import group_size, unreadable
from amoeba_plugin.elastic.subnet_config import is_per_layer, per_layer_class, weightless
from amoeba_plugin.errors import ArchitectureError, RecipeError, did_you_mean
from amoeba_plugin.models.adapter import ArchitectureAdapter, copy_config
from amoeba_plugin.models.architectures.gated import head_size
from amoeba_plugin.models.expert_linears import take_apart

RULES = Path(__file__).with_name("engine_rules")


class Rule(BaseModel):
    """One thing that an engine wants; the module says what the fields are."""

    model_config = ConfigDict(extra="forbid")

    check: str
    level: Literal["refuse", "warn"]
    says: str
    source: str
    value: Any = None
    classes: list[str] | None = None
    schemes: list[str] | None = None


class EngineRules(BaseModel):
    """What an engine loads: the versions that were read, the schemes it knows, and its rules."""

    model_config = ConfigDict(extra="forbid")

    read: str
    unquantized: list[str] = Field(default_factory=list)
    schemes: Literal["compressed-tensors"] | dict[str, int]
    rules: list[Rule]


@dataclass(frozen=True)
class Candidate:
    """A subnet that somebody wants to load.

    Attributes:
        config: Its configuration.
        linears: Per name in a decoder layer the (inputs, outputs), of the first layer; of all layers by "NAME of layer
            INDEX" where they differ in size.
        split_inputs: Names of the linears whose inputs, not outputs, are split over devices.
        group_size: Inputs that share a scale, or ``None``.
        scheme: Name of the quantization, or ``None``.
        devices: Over which the model is split (tensor parallel).
        experts: Whether it is a mixture of experts.
    """

    config: PretrainedConfig
    linears: Mapping[str, tuple[int, int]]
    split_inputs: frozenset[str]
    group_size: int | None = None
    scheme: str | None = None
    devices: int = 1
    experts: bool = False

    @property
    def class_name(self) -> str:
        """Name of the model's class."""
        stock: Any = AutoModelForCausalLM._model_mapping[type(self.config)]
        return str(stock.__name__)

    @property
    def saved_as(self) -> str:
        """Name of the class that its checkpoint is loaded as."""
        return per_layer_class(self.config).__name__ if is_per_layer(self.config) else self.class_name

    @property
    def layer_configs(self) -> Sequence[PretrainedConfig]:
        """One configuration for each layer where they differ; transformers warns who asks the model's for a size."""
        return list(self.config.per_layer_config) if is_per_layer(self.config) else [self.config]

    def inputs(self) -> dict[str, int]:
        """Return per linear its inputs on one device."""
        return {
            name: size[0] // self.devices if name in self.split_inputs else size[0]
            for name, size in self.linears.items()
        }

    def outputs(self) -> dict[str, int]:
        """Return per linear its outputs on one device."""
        return {
            name: size[1] if name in self.split_inputs else size[1] // self.devices
            for name, size in self.linears.items()
        }


@dataclass(frozen=True)
class Finding:
    """A rule that a candidate breaks, and where."""

    rule: Rule
    where: str


def read_rules(path: Path) -> EngineRules:
    """Return the rules in a file."""
    return EngineRules(**yaml.safe_load(path.read_text(encoding="utf-8")))


@cache
def engine_rules() -> dict[str, EngineRules]:
    """Return the rules by engine: those that come with the package, and those that installed flows bring."""
    shipped = {path.stem: path for path in sorted(RULES.glob("*.yaml"))}
    brought = {name: flow.rules for name, flow in installed_flows().items() if flow.rules is not None}
    return {name: read_rules(path) for name, path in {**shipped, **brought}.items()}


def candidate(
    config: PretrainedConfig,
    adapter: ArchitectureAdapter,
    engine: str,
    scheme: str | None = None,
    devices: int = 1,
) -> Candidate:
    """Describe a subnet to an engine.

    Args:
        config: The subnet's.
        adapter: The whole model's architecture.
        engine: Its name.
        scheme: A quantization scheme of it, by name.
        devices: To split the model over.

    Raises:
        RecipeError: If the engine or the scheme is unknown.
    """
    shared = _weights_per_scale(require_engine(engine), engine, scheme)
    uneven = is_per_layer(config)
    model = weightless(config) if uneven else _one_layer(config)
    groups = adapter.channel_groups(config.per_layer_config[0] if uneven else config)
    consumers = {group.consumer.path for group in groups}
    experts = any(group.consumer.expert is not None for group in groups)
    if experts:  # quantized, and split over devices, one linear at a time
        model = take_apart(model, adapter)
        layers = adapter.layers(model)  # the first one may have lost its experts
        consumers |= {path for layer in layers for path, _ in layer.named_modules() if path.endswith(".down_proj")}
    linears, split = {}, set()
    for index, layer in enumerate(adapter.layers(model)):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                name = path.rpartition(".")[2] + (f" of layer {index}" if uneven else "")
                linears[name] = (module.in_features, module.out_features)
                split |= {name} if path in consumers else set()
    return Candidate(config, linears, frozenset(split), shared, scheme, devices, experts)


def findings(subject: Candidate, engine: str) -> list[Finding]:
    """Return the rules of an engine that a candidate breaks, what refuses it first."""
    found = []
    for rule in require_engine(engine).rules:
        if rule.classes is not None and subject.class_name not in rule.classes:
            continue
        if rule.schemes is not None and subject.scheme not in rule.schemes:
            continue
        where = CHECKS[rule.check](subject, rule.value)
        if where:
            found.append(Finding(rule, where))
    return sorted(found, key=lambda finding: finding.rule.level)


def require_loadable(subject: Candidate, engine: str) -> list[Finding]:
    """Return the warnings of an engine about a candidate.

    Raises:
        ArchitectureError: If the engine cannot load it; with every reason and its source.
    """
    found = findings(subject, engine)
    refused = [finding for finding in found if finding.rule.level == "refuse"]
    if refused:
        reasons = ". ".join(f"{each.where}: {each.rule.says} [{each.rule.source}]" for each in refused)
        raise ArchitectureError(f"{engine} ({engine_rules()[engine].read}) cannot load it. {reasons}")
    return found


def require_engine(name: str) -> EngineRules:
    """Return the rules of an engine.

    Raises:
        RecipeError: If there is none of that name.
    """
    known = engine_rules()
    if name not in known:
        raise RecipeError(
            f"no rules are known of an engine '{name}'; take one of {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return known[name]


def _weights_per_scale(of: EngineRules, name: str, scheme: str | None) -> int | None:
    if scheme is None or scheme in of.unquantized:
        return None
    known = PRESET_SCHEMES if of.schemes == "compressed-tensors" else of.schemes
    if scheme not in known:
        raise RecipeError(
            f"{name} has no scheme '{scheme}'.{did_you_mean(scheme, known)} Take one of "
            f"{', '.join([*of.unquantized, *known])}, or leave the scheme out"
        )
    if isinstance(of.schemes, dict):
        return of.schemes[scheme]
    return group_size(preset_name_to_scheme(scheme, ["Linear"]))


def _one_layer(config: PretrainedConfig) -> PreTrainedModel:
    single = copy_config(config)
    single.num_hidden_layers = 1
    if getattr(single, "layer_types", None) is not None:
        single.layer_types = single.layer_types[:1]
    return weightless(single)


def _class_among(subject: Candidate, allowed: list[str]) -> str:
    return "" if subject.class_name in allowed else subject.class_name


def _layers_alike(subject: Candidate, _: None) -> str:
    if not is_per_layer(subject.config):
        return ""
    return "layers without attention or MLP" if hasattr(subject.config, "stand_ins") else "per-layer sizes"


def _layers_whole(subject: Candidate, _: None) -> str:
    return "layers without attention or MLP" if hasattr(subject.config, "stand_ins") else ""


def _field_is_off(subject: Candidate, field: str) -> str:
    return f"{field} is set" if getattr(subject.config, field, False) else ""


def _heads_split(subject: Candidate, _: None) -> str:
    for config in subject.layer_configs:
        heads, devices = config.num_attention_heads, subject.devices
        pairs = getattr(config, "num_key_value_heads", None) or heads
        if heads % devices or (pairs % devices and devices % pairs):
            return f"{heads} heads and {pairs} KV heads over {devices} devices"
    return ""


def _neurons_split(subject: Candidate, _: None) -> str:
    sizes = {name: subject.linears[name][0] for name in subject.split_inputs}
    return _listed({name: size for name, size in sizes.items() if size % subject.devices}, "inputs")


def _head_size_among(subject: Candidate, allowed: list[int]) -> str:
    size = head_size(subject.layer_configs[0])
    return "" if size in allowed else f"heads of {size} channels"


def _heads_fill_hidden(subject: Candidate, _: None) -> str:
    for config in subject.layer_configs:
        heads, size, hidden = config.num_attention_heads, head_size(config), config.hidden_size
        if heads * size != hidden:
            return f"{heads} heads of {size} channels on hidden size {hidden}"
    return ""


def _group_size_among(subject: Candidate, allowed: list[int]) -> str:
    size = subject.group_size
    return "" if size is None or size in allowed else f"groups of {size}"


def _groups_divide_inputs(subject: Candidate, _: None) -> str:
    size = subject.group_size or 1
    return _listed({name: inputs for name, inputs in subject.inputs().items() if inputs % size}, "inputs")


def _inputs_multiple(subject: Candidate, step: int) -> str:
    return _listed({name: inputs for name, inputs in subject.inputs().items() if inputs % step}, "inputs")


def _outputs_multiple(subject: Candidate, step: int) -> str:
    return _listed({name: outputs for name, outputs in subject.outputs().items() if outputs % step}, "outputs")


def _outputs_unlike_vocabulary(subject: Candidate, _: None) -> str:
    tokens = subject.config.vocab_size
    return _listed({name: size[1] for name, size in subject.linears.items() if size[1] == tokens}, "outputs")


def _rope_type_among(subject: Candidate, allowed: list[str]) -> str:
    parameters = getattr(subject.config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")  # of several kinds of layers they are by the kind
    return "" if kind in allowed else f"rotary positions of type {kind}"


def _experts_readable(subject: Candidate, _: None) -> str:
    if subject.scheme is None or not subject.experts:
        return ""
    wrong = unreadable(preset_name_to_scheme(subject.scheme, ["Linear"]))
    return f"experts with {wrong}" if wrong else ""


def _listed(sizes: Mapping[str, int], unit: str) -> str:
    return ", ".join(f"{name} ({size} {unit})" for name, size in sizes.items())


CHECKS: dict[str, Callable[[Candidate, Any], str]] = {
    check.__name__.removeprefix("_"): check
    for check in (
        _class_among, _layers_alike, _layers_whole, _field_is_off, _heads_split, _neurons_split, _head_size_among,
        _heads_fill_hidden, _group_size_among, _groups_divide_inputs, _inputs_multiple, _outputs_multiple,
        _experts_readable, _outputs_unlike_vocabulary, _rope_type_among,
    )
}  # fmt: skip
