"""A layer-wise policy as an ordinary recipe of llm-compressor's own modifiers, which runs without this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from amoeba_plugin.data.text import load_batches
from amoeba_plugin.elastic.subnet_config import weightless
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.models.finite import require_finite_weights
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.modifiers.policy_hosts import pruning_fields, scheme_groups
from amoeba_plugin.modifiers.selection import on_main_device
from amoeba_plugin.recipes.inputs import RunOptions
from amoeba_plugin.recipes.model_plan import require_full_precision
from amoeba_plugin.runtime.dtypes import computing_dtype, dtype_of
from amoeba_plugin.runtime.files import require_writable, write_atomically
from amoeba_plugin.runtime.model_files import load_config, load_tokenizer
from amoeba_plugin.runtime.whole_weights import require_weights
from amoeba_plugin.selection.layerwise.options import WHOLE
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy
from amoeba_plugin.selection.layerwise.search import PolicyBudget, find_policy
from amoeba_plugin.selection.layerwise.units import layer_units
from amoeba_plugin.selection.registry import sensitivity_named

Quantizer = Literal["gptq", "rtn"]
Pruner = Literal["sparsegpt", "wanda"]
QUANTIZERS = {"gptq": "GPTQModifier", "rtn": "QuantizationModifier"}
PRUNERS = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}
PAGE = 120  # characters of a line of the recipe


@dataclass(frozen=True)
class PolicyTools:
    """Which of llm-compressor's modifiers carry a policy out, and by what units are scored.

    Attributes:
        sensitivity: Name of what scores units.
        quantizer: ``gptq``, or ``rtn``: round to nearest.
        pruner: ``sparsegpt`` or ``wanda``.
    """

    sensitivity: str = "kl"
    quantizer: Quantizer = "gptq"
    pruner: Pruner = "sparsegpt"


def make_policy(
    model: str, dataset: str, output: Path, budget: PolicyBudget, tools: PolicyTools, options: RunOptions,
    data: Path | None = None,
) -> LayerwisePolicy:  # fmt: skip
    """Find a policy and write its recipe; what can be refused is refused before the model's weights are loaded.

    Args:
        model: Path or hub id of a causal LM.
        dataset: Calibration text.
        output: The recipe, a new .yaml file.
        budget: Averages and options.
        tools: What carries it out.
        options: How calibration data is drawn, and the dtype to compute in.
        data: Where the policy itself goes, a new .json file; ``None``: nowhere.

    Raises:
        AmoebaError: If model, data, budget and files do not fit together.
    """
    for path in (output, *([] if data is None else [data])):
        _require_new(path)
    sensitivity = sensitivity_named(tools.sensitivity)
    config = load_config(model)
    require_full_precision(config)
    adapter, skeleton = architecture_of(config), weightless(config)
    budget.require_reachable(layer_units(skeleton, adapter))
    require_weights(model, config)
    batches = load_batches(
        dataset, load_tokenizer(model), split=options.split, text_column=options.text_column,
        num_samples=options.num_samples, max_seq_length=options.max_seq_length, batch_size=options.batch_size,
        vocab_size=config.vocab_size, seed=options.seed,
    )  # fmt: skip
    dtype = computing_dtype(dtype_of(config))[0] if options.dtype == "auto" else options.dtype
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    require_finite_weights(loaded)
    with on_main_device(loaded):
        found = find_policy(loaded, adapter, batches, sensitivity, budget)
    write_atomically(output, recipe_of(found, skeleton, tools).encode())
    if data is not None:
        found.save(data)
    return found


def recipe_of(policy: LayerwisePolicy, model: nn.Module, tools: PolicyTools) -> str:
    """Return a policy as the text of a recipe.

    Args:
        policy: Of the model.
        model: Needs no weights; its modules are named in its order.
        tools: What carries it out.
    """
    stages: dict[str, Any] = {}
    pruning = pruning_fields(policy, model)
    if pruning["targets"]:
        stages["prune_stage"] = {"policy_pruning_modifiers": {PRUNERS[tools.pruner]: pruning}}
    groups = scheme_groups(policy, model)
    if groups:
        quantizer = {"config_groups": groups, "ignore": []}
        stages["quantize_stage"] = {"policy_quantization_modifiers": {QUANTIZERS[tools.quantizer]: quantizer}}
    counted = "".join(
        f"#   {bits:>2} bits: {sum(each.bits == bits for each in policy.units.values())} units\n"
        for bits in sorted({each.bits for each in policy.units.values()})
        if groups
    )
    whole = (
        "" if not groups or all(each.bits != WHOLE for each in policy.units.values()) else "#   (16: not quantized)\n"
    )
    return (
        f"# A layer-wise policy: {policy.in_words}.\n"
        f"# By sensitivity {policy.sensitivity} and allocation {policy.allocation}, for llm-compressor alone.\n"
        f"{counted}{whole}" + yaml.safe_dump(stages, sort_keys=False, default_flow_style=None, width=PAGE)
    )


def _require_new(path: Path) -> None:
    if path.exists():
        raise ArtifactError(f"{path} exists; nothing is overwritten: name another file")
    if not path.parent.is_dir():
        raise ArtifactError(f"there is no directory {path.parent} for {path.name}; make it first")
    require_writable(path.parent)
