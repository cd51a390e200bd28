"""The README of an extracted checkpoint: what it was cut from, how, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from amoeba_plugin._version import __version__
from amoeba_plugin.elastic import ElasticModel
from amoeba_plugin.extraction import largest_units, layer_units
from amoeba_plugin.shape import SubnetShape

CARD_NAME = "README.md"


def model_card(
    elastic: ElasticModel, subnet: PreTrainedModel, shape: SubnetShape, adapter: str, portable: bool
) -> dict[str, str]:
    """Return what is known of a subnet, by what it is called in the card.

    Args:
        elastic: What it was cut from.
        subnet: As :func:`amoeba_plugin.extraction.extract` returned it.
        shape: Its shape.
        adapter: What became of the adapter: "fold", "separate" or "none".
        portable: Whether layers of different sizes were padded.
    """
    strategy, kept = elastic.strategy, elastic.kept_layers(shape)
    sizes = layer_units(elastic, shape)
    even = all(units == sizes[0] for units in sizes)
    own = sum(parameter.numel() for parameter in subnet.parameters())
    whole = _parameters(elastic.config)
    facts = {
        "base model": str(elastic.config.name_or_path),
        "shape": f"`{shape}`, of {elastic.space.largest}",
        "layers kept": f"{len(kept)} of {len(elastic.layers)}: {', '.join(map(str, elastic.listed(shape)))}",
        "units per layer": _units(sizes[0]) if even else f"not the same, up to {_units(largest_units(sizes))}",
        "class": f"`{type(subnet).__name__}`",
        "parameters": f"{own:,} of {whole:,} ({own / whole:.1%})",
        "adapter": {"fold": "folded in", "separate": "in `adapter/`, an ordinary LoRA"}.get(adapter, "none"),
        "width": f"importance {strategy.width.importance or 'given'}, allocation {strategy.width.allocation}"
        + (", biases that stand in for missing channels" if strategy.width.bias_compensation else ""),
        "depth": f"objective {strategy.depth.objective or 'given'}",
    }
    metric = strategy.depth.metric.get(shape.depth, math.nan)
    if math.isfinite(metric):
        facts["depth"] += f"; {metric:.4g} at {shape.depth} layers of full width on the selection data, before training"
    lost = elastic.lost(shape)
    if lost:
        gone = ", ".join(f"{layer}.{part}" for layer, part in lost.items())
        facts["sublayers removed"] = gone
    if portable and not even:
        facts["padded"] = "with zeros to the largest layer, for loaders without per-layer sizes: **no speed is gained**"
    if portable and lost:
        facts["zeroed"] = "what the sublayers removed end in, for loaders that want all: **no speed is gained there**"
    return facts


def write_model_card(directory: Path, facts: Mapping[str, str], parity: str, remote_code: bool) -> None:
    """Write the card beside a checkpoint.

    Args:
        directory: Of the checkpoint.
        facts: From :func:`model_card`.
        parity: What :func:`amoeba_plugin.checkpoint.measure_parity` found, in words.
        remote_code: Whether it loads with ``trust_remote_code=True`` only.
    """
    base = facts["base model"]
    data = ModelCardData(
        base_model=None if Path(base).exists() else base, library_name="transformers", pipeline_tag="text-generation",
        tags=["amoeba_plugin"],
    )  # fmt: skip
    trust = ", trust_remote_code=True" if remote_code else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in {**facts, "parity": parity}.items())
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(base).name or 'subnet'} at {facts['shape'].partition('`, ')[0]}`\n\n"
        f"A subnet of an elastic model, cut by amoeba_plugin {__version__}.\n\n| | |\n|---|---|\n{rows}\n\n"
        f'```python\nAutoModelForCausalLM.from_pretrained("."{trust})\n```\n'
    )
    ModelCard(text).save(directory / CARD_NAME)


def _parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _units(units: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in units.items())
