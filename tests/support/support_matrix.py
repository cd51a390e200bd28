"""The table of architectures on the models' page; `PYTHONPATH=tests python -m support.support_matrix` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.models.adapter import ArchitectureAdapter
from amoeba_plugin.models.registry import architecture_for
from support.architectures import CONFIGS, OWN_STAGE, QUANTIZED

README = Path(__file__).parents[2] / "amoeba_plugin" / "models" / "README.md"
BLOCK = re.compile(r"(?<=<!-- support:start -->\n).*?(?=<!-- support:end -->)", re.DOTALL)
HEADER = (
    "`model_type`",
    "depth",
    "attention width",
    "MLP width",
    "bias compensation held by",
    "recipe",
)
UNITS = {"attention": "KV groups", "mlp": "neurons"}


def table(configs: dict[str, dict[str, Any]], own_stage: Iterable[str], quantized: Iterable[str]) -> str:
    """Return a Markdown table.

    Args:
        configs: Of the conformance tests, by model type.
        own_stage: Model types that llm-compressor's ``oneshot`` cannot shrink, and ``amoeba run`` can.
        quantized: Model types that a test takes through a recipe that quantizes.
    """
    lines = [HEADER, ("---",) * len(HEADER)]
    for model_type, fields in sorted(configs.items()):
        config = AutoConfig.for_model(**fields)
        adapter = architecture_for(model_type)
        groups = {"attention": "no"}
        for group in adapter.channel_groups(config):
            groups[group.name] = UNITS[group.name] if group.consumer.expert is None else "neurons of every expert"
        run = "with `amoeba run`" if model_type in own_stage else "yes"
        run += "" if model_type in quantized else ", not quantized"
        cells = (depths(adapter, config), groups["attention"], groups["mlp"], carrier(adapter, config), run)
        lines.append((f"`{model_type}`", *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def depths(adapter: ArchitectureAdapter, config: PretrainedConfig) -> str:
    """Return what of a decoder may go."""
    try:
        adapter.sublayers(config)
    except ArchitectureError:
        return "layers"
    return "layers, sublayers"


def carrier(adapter: ArchitectureAdapter, config: PretrainedConfig) -> str:
    """Return the model type of the subnets that carry compensating biases, of a model without sliding windows."""
    units = {group.name: group.units for group in adapter.channel_groups(config)}
    config.sliding_window = None
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    try:
        found = adapter.subnet_config(config, range(config.num_hidden_layers), units, frozenset(units))
    except ArchitectureError:
        return "no"
    return f"`{found.model_type}`"


def written() -> str:
    """Return the table that README holds."""
    found = BLOCK.search(README.read_text(encoding="utf-8"))
    assert found is not None, "README has no block between support:start and support:end"
    return found.group()


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: table(CONFIGS, OWN_STAGE, QUANTIZED), text), encoding="utf-8")
