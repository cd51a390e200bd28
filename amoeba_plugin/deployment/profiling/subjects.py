"""Models of random weights that stand in for a model's shapes: what they cost does not depend on values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from amoeba_plugin.deployment.loads import uniform_sizes
from amoeba_plugin.elastic.checkpoint import attach_untrained, save_elastic
from amoeba_plugin.elastic.layer_sizes import LayerSizes
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import Repairs
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.elastic.subnet_config import config_for
from amoeba_plugin.elastic.subnet_plan import SubnetPlan
from amoeba_plugin.errors import DataError, DeploymentError
from amoeba_plugin.models.adapter import ArchitectureAdapter, group_key
from amoeba_plugin.models.fingerprint import model_fingerprint
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.runtime.model_files import load_tokenizer
from amoeba_plugin.shape import ShapeSpace, SubnetShape


@dataclass(frozen=True)
class Subject:
    """A model to be profiled, without its weights.

    Attributes:
        config: Its configuration.
        adapter: Of its architecture.
        space: Its shapes.
        strategy: Which sizes its shapes have; ``None``: the same share of everything in every layer.
        adapted: The configuration of the adapter that the elastic model computes with; ``None``: there is none.
    """

    config: PretrainedConfig
    adapter: ArchitectureAdapter
    space: ShapeSpace
    strategy: SubnetStrategy | None = None
    adapted: PeftConfig | None = None

    @classmethod
    def of(
        cls, config: PretrainedConfig, space: ShapeSpace, strategy: SubnetStrategy | None = None,
        adapted: PeftConfig | None = None,
    ) -> Subject:  # fmt: skip
        """Return the subject; a strategy brings its own space."""
        space = space if strategy is None else strategy.space
        return cls(config, architecture_of(config), space, strategy, adapted)

    @property
    def adapted_by(self) -> str:
        """The adapter in words, as far as it takes time; empty: there is none."""
        if self.adapted is None:
            return ""
        told = {name: getattr(self.adapted, name, None) for name in ("num_experts", "combination")}
        more = "".join(f", {name} {value}" for name, value in told.items() if value is not None)
        linears = self.adapted.target_modules  # type: ignore[attr-defined]
        on = linears if isinstance(linears, str) else ", ".join(sorted(linears or ()))
        return f"{self.adapted.peft_type.value} of rank {self.adapted.r}{more}, on {on}"  # type: ignore

    def sizes(self, shape: SubnetShape) -> LayerSizes:
        """Return what every layer keeps at a shape."""
        if self.strategy is None:
            return uniform_sizes(self.adapter, self.config, shape)
        return SubnetPlan(self.adapter, self.config, self.strategy).sizes(shape)

    def save_shape(self, shape: SubnetShape, directory: Path) -> Path:
        """Save a shape with random weights, and the model's tokenizer; where it has none, another of as many tokens."""
        model = _random(config_for(self.adapter, self.config, self.sizes(shape)))
        model.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)
        return directory

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        with suppress(DataError):
            if self.config.name_or_path:
                return load_tokenizer(self.config.name_or_path)
        return _placeholder_tokenizer(self.config.vocab_size)

    def save_elastic(self, directory: Path) -> Path:
        """Save an elastic checkpoint of random weights with the subject's sizes and adapter."""
        model = _random(self.config)
        model.save_pretrained(directory / "base")
        fingerprint = model_fingerprint(model, self.adapter)
        strategy = self._uniform(fingerprint) if self.strategy is None else self.strategy
        strategy = replace(strategy, fingerprint=fingerprint, repairs=Repairs())
        live = ElasticModel(model, strategy)
        peft_model = None if self.adapted is None else attach_untrained(live, self.adapted)
        save_elastic(live, peft_model, directory / "elastic", str(directory / "base"))
        return directory / "elastic"

    def _uniform(self, fingerprint: str) -> SubnetStrategy:
        layers, groups = self.config.num_hidden_layers, self.adapter.channel_groups(self.config)
        keyed = {group_key(index, group): group for index in range(layers) for group in groups}
        units: dict[object, Mapping[str, int]] = {}
        for width in self.space.widths:
            of = uniform_sizes(self.adapter, self.config, SubnetShape(layers, width)).largest
            units[width] = {key: of[group.name] for key, group in keyed.items()}
        order = {key: torch.arange(group.units) for key, group in keyed.items()}
        depth = DepthStrategy({count: tuple(range(int(count))) for count in self.space.depths})
        return SubnetStrategy(depth, WidthStrategy(units, order), fingerprint)  # type: ignore[arg-type]


def _random(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return model


def _placeholder_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with so many tokens, most of which nothing becomes.

    Raises:
        DeploymentError: If there are fewer tokens than bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(alphabet) + 1:
        raise DeploymentError(f"a vocabulary of {vocabulary} tokens has no room for {len(alphabet)} bytes")
    merged = alphabet[0] * 2
    tokens = [*alphabet, merged, *(f"<{number}>" for number in range(vocabulary - len(alphabet) - 1))]
    vocab = {token: number for number, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab, [(alphabet[0], alphabet[0])]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=tokens[-1], eos_token=tokens[-1])
