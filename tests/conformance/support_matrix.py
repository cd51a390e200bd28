"""README's table of architectures, made from what the conformance tests run.

python tests/conformance/support_matrix.py        # prints it
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from amoeba_plugin.architecture import ArchitectureAdapter
from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.plugins import architecture_for

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(?<=<!-- support:start -->\n).*?(?=<!-- support:end -->)", re.DOTALL)
UNITS = {"attention": "KV groups", "mlp": "neurons"}


def table(tested: Iterable[Mapping[str, Any]], quantized: Iterable[str]) -> str:
    """Return a Markdown table.

    Args:
        tested: Configurations of the conformance tests, with ``model_type``.
        quantized: Model types that a test takes through llm-compressor.
    """
    configs = {}
    for fields in tested:
        rest = {name: value for name, value in fields.items() if name != "model_type"}
        configs.setdefault(fields["model_type"], AutoConfig.for_model(fields["model_type"], **rest))
    lines = [
        "| `model_type` | depth | attention width | MLP width | bias compensation is held by | quantized in the recipe |",
        "|---|---|---|---|---|---|",
    ]
    for model_type, config in sorted(configs.items()):
        adapter = architecture_for(model_type)
        groups = {group.name: UNITS[group.name] for group in adapter.channel_groups(config)}
        cells = (f"`{model_type}`", "layers", groups.get("attention", "–"), groups["mlp"], carrier(adapter, config),
                 "yes" if model_type in quantized else "–")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def carrier(adapter: ArchitectureAdapter, config: PretrainedConfig) -> str:
    """Return the model type of the subnets of a model that carry compensating biases."""
    groups = adapter.channel_groups(config)
    units = {group.name: group.units for group in groups}
    config.sliding_window = None  # a window may be all that stands against it
    config.layer_types = None if getattr(config, "layer_types", None) is None else ["full_attention"] * 4
    try:
        return f"`{adapter.subnet_config(config, range(4), units, frozenset(units)).model_type}`"
    except ArchitectureError:
        return "–"


def stated() -> str:
    """Return the table that README holds."""
    found = BLOCK.search(README.read_text(encoding="utf-8"))
    assert found is not None, "README has no block between support:start and support:end"
    return found.group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from test_architecture_recipes import QUANTIZED
    from test_architectures import CASES

    print(table(CASES, QUANTIZED), end="")
