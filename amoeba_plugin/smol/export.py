"""Hand one shape of a SMOL adapter to tools that know only LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from amoeba_plugin.errors import AdapterError
from amoeba_plugin.runtime.full_disk import full_disk_named
from amoeba_plugin.smol.config import SmolConfig
from amoeba_plugin.smol.host import BaseTunerLayer


class LoraPair(NamedTuple):
    """One layer's update, ``dW = scaling * B A``."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)
    scaling: float


def lora_config(pairs: Mapping[str, LoraPair], config: SmolConfig, target_modules: list[str]) -> LoraConfig:
    """Describe the pairs, by module name, to PEFT; exact for any mix of ranks and scales.

    ``lora_alpha`` and ``r`` are those of most layers, the patterns name the others.
    """
    # scaling = alpha / rank, so alpha = scaling * rank; round-off of s = alpha / r is undone by round()
    settings = {
        name: (pair.A.shape[0], round(float(pair.scaling * pair.A.shape[0]), 9)) for name, pair in pairs.items()
    }
    values = list(settings.values())
    rank, alpha = max(set(values), key=values.count)
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=target_modules,
        rank_pattern={name: r for name, (r, _) in settings.items() if r != rank},
        alpha_pattern={name: a for name, (_, a) in settings.items() if a != alpha},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        fan_in_fan_out=False,
        inference_mode=True,
    )


def write_lora(
    directory: str | os.PathLike[str], pairs: Mapping[str, LoraPair], config: SmolConfig, model: nn.Module
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``: both, or neither.

    Args:
        directory: Created when it is not there.
        pairs: LoRA pairs by module name in ``model``.
        config: The SMOL adapter they come from.
        model: The base model, with its adapters on.

    Raises:
        AdapterError: If the adapter also holds whole modules or biases.
        ArtifactError: If the disk is full; what was in the directory is still there.
    """
    for what, present in (
        ("whole modules (modules_to_save)", config.modules_to_save),
        ("biases", config.bias != "none"),
    ):
        if present:
            raise AdapterError(
                f"the adapter also holds {what}, which a LoRA written here would lose; use merge_and_unload() instead"
            )
    lora = lora_config(pairs, config, target_names(model, set(pairs)))
    adapted = [model.get_submodule(name) for name in pairs]
    bases = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in adapted]
    lora.fan_in_fan_out = any(isinstance(base, Conv1D) for base in bases)
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.B.detach().cpu().contiguous()
    _write_both(Path(directory), lora, tensors)


def _write_both(directory: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    advice = "no adapter was written there. Free space or name another directory"
    with full_disk_named(directory, advice):
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory) as scratch:
            config.save_pretrained(scratch)
            save_file(dict(tensors), Path(scratch) / "adapter_model.safetensors", metadata={"format": "pt"})
            for path in Path(scratch).iterdir():
                path.replace(directory / path.name)


def target_names(model: nn.Module, targets: set[str]) -> list[str]:
    """Return the shortest names that target these modules and no others: ["q_proj"], or full names where that fails."""
    adapters = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inner = tuple(f"{name}." for name in adapters)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inner)]
    suffixes = {name.rpartition(".")[2] for name in targets}
    matched = {name for name in names if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if matched == targets else targets)
