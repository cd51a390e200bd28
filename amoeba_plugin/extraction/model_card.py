"""The README of a checkpoint: what it was made from, how, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from yaml import YAMLError

from amoeba_plugin._version import __version__
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.repairs import place_of
from amoeba_plugin.elastic.strategy import DepthStrategy
from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE, why_not_cut_again
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.shape import SubnetShape

CARD_NAME, RECIPE_NAME = "README.md", "recipe.yaml"
LICENCE = ("license", "license_name", "license_link")


def model_card(
    elastic: ElasticModel, subnet: PreTrainedModel, shape: SubnetShape, adapter: str, portable: bool
) -> dict[str, str]:
    """Return what is known of a subnet, by what it is called in the card.

    Args:
        elastic: What it was cut from.
        subnet: As :func:`amoeba_plugin.extraction.cut.extract` returned it.
        shape: Its shape.
        adapter: What became of the adapter: "fold", "separate" or "none".
        portable: Whether layers of different sizes were padded.
    """
    strategy, sizes = elastic.strategy, elastic.plan.sizes(shape)
    own = sum(parameter.numel() for parameter in subnet.parameters())
    whole = _parameters(elastic.config)
    facts = {
        "base model": str(elastic.config.name_or_path),
        "shape": f"`{shape}`, of {elastic.space.largest}",
        "layers kept": f"{len(sizes.kept)} of {len(elastic.layers)}: {', '.join(map(str, elastic.listed(shape)))}",
        "units per layer": ("" if sizes.even else "not the same, up to ") + _units(sizes.largest),
        "class": f"`{type(subnet).__name__}`",
        "parameters": f"{own:,} of {whole:,} ({own / whole:.1%})",
        "adapter": {"fold": "folded in", "separate": "in `adapter/`, an ordinary LoRA"}.get(adapter, "none"),
        "width": f"importance {strategy.width.importance or 'given'}, allocation {strategy.width.allocation}"
        + (", biases that stand in for missing channels" if strategy.width.bias_compensation else ""),
        "depth": _chosen(strategy.depth),
    }
    metric = strategy.depth.metric.get(shape.depth, math.nan)
    if math.isfinite(metric):
        facts["depth"] += f"; {metric:.4g} at {shape.depth} layers of full width on the selection data, before training"
    accuracy = strategy.provenance.get("accuracy", {})
    held_out = accuracy.get("by depth", {}).get(str(shape.depth))
    if held_out is not None:
        facts["held out"] = f"accuracy {held_out:.1%} on the split '{accuracy['split']}', full width, before training"
    final = why_not_cut_again(subnet.config)
    if final is not None:
        facts["cut again"] = f"no, {final}"
    if place_of(shape, strategy.repairs.weights) is not None:
        facts["repaired"] = f"by {strategy.repairs.method}, in closed form, before any training"
    lost = elastic.lost(shape)
    if lost:
        gone = ", ".join(f"{layer}.{part}" for layer, part in lost.items())
        facts["sublayers removed"] = gone
    if portable and not sizes.even:
        facts["padded"] = "with zeros to the largest layer, for loaders without per-layer sizes: **no speed is gained**"
    if portable and lost:
        facts["zeroed"] = "what the sublayers removed end in, for loaders that want all: **no speed is gained there**"
    return facts


def write_model_card(directory: Path, facts: Mapping[str, str]) -> None:
    """Write the card beside a checkpoint; its recipe goes in where there is one, and how it is quantized.

    Args:
        directory: Of the checkpoint, complete but for the card.
        facts: From :func:`model_card`, and "parity", what ``parity.py`` found, where it was measured;
            "base model" at least.
    """
    base = facts["base model"]
    data = ModelCardData(
        base_model=None if Path(base).exists() else base, library_name="transformers", pipeline_tag="text-generation",
        tags=["amoeba_plugin"],
    )  # fmt: skip
    for name, value in _licence(base).items():
        data[name] = value
    quantization = _quantization(directory)
    told = {name: value for name, value in facts.items() if name != "parity"} | quantization
    if "parity" in facts:
        told["parity"] = facts["parity"] + (", before quantization" if quantization else "")
    rows = "\n".join(f"| {name} | {value} |" for name, value in told.items())
    shape = f" at {facts['shape'].partition('`, ')[0]}`" if "shape" in facts else ""
    what = "A subnet of an elastic model, cut" if shape else "Written"
    trust = ", trust_remote_code=True" if (directory / PER_LAYER_FILE).is_file() else ""
    recipe = directory / RECIPE_NAME
    used = f"\n## Recipe\n\n```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```\n" if recipe.is_file() else ""
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(base).name or 'subnet'}{shape}\n\n"
        f"{what} by amoeba_plugin {__version__}.\n\n| | |\n|---|---|\n{rows}\n\n"
        f'```python\nAutoModelForCausalLM.from_pretrained("."{trust})\n```\n{used}'
    )
    write_atomically(directory / CARD_NAME, str(ModelCard(text)).encode())


def _licence(base: str) -> dict[str, str]:
    """Return the licence that the base model's card names, which holds for what is cut of it; nothing is downloaded."""
    card = Path(base) / CARD_NAME if Path(base).exists() else try_to_load_from_cache(base, CARD_NAME)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return {}
    try:
        told = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):  # somebody else's file: none that can be read
        return {}
    return {name: str(told[name]) for name in LICENCE if told.get(name)}


def require_model_card(directory: Path, facts: Mapping[str, str]) -> None:
    """Write the card where there is none, and again where more than the base model is known."""
    if len(facts) > 1 or not (directory / CARD_NAME).exists():
        write_model_card(directory, facts)


def _quantization(directory: Path) -> dict[str, str]:
    method = json.loads((directory / "config.json").read_bytes()).get("quantization_config")
    if method is None:
        return {}
    groups = [each.get("weights") or {} for each in method.get("config_groups", {}).values()]
    bits = ", ".join(f"weights of {weights['num_bits']} bits" for weights in groups if "num_bits" in weights)
    return {"quantized": ", ".join(filter(None, (method.get("quant_method"), method.get("format"), bits)))}


def _parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _chosen(depth: DepthStrategy) -> str:
    """Return what chose the layers, in words."""
    by = {"selector": depth.selector, "objective": depth.objective}
    return ", ".join(f"{what} {name}" for what, name in by.items() if name) or "layers given"


def _units(units: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in units.items())
