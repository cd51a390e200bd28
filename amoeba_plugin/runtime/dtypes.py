"""Two dtypes of a run: the one that a machine computes in, and the one that weights are stored in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from amoeba_plugin.errors import ArchitectureError
from amoeba_plugin.runtime.files import write_atomically
from amoeba_plugin.runtime.model_files import load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# By which a CPU multiplies matrices of a half precision, as torch names them; without any it is slower than in float32.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
KEPT_WIDE = "global_scale"  # of FP4: float32 in every checkpoint


def named(dtype: torch.dtype) -> str:
    """Return a dtype's name.

    >>> named(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def stored_dtype(model: str) -> torch.dtype | None:
    """Return the dtype of a model's weights as its configuration names it, by path or hub id; else ``None``."""
    try:
        return dtype_of(load_config(model))
    except ArchitectureError:
        return None


def dtype_of(config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype of the weights that a configuration belongs to, where it names one."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def has_instructions(dtype: torch.dtype) -> bool:
    """Tell whether this machine computes in a dtype without detours: on an accelerator, or by a CPU's instructions."""
    if torch.accelerator.is_available() or dtype not in INSTRUCTIONS:
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch that is supported
    return capabilities is None or any(capabilities().get(name, False) for name in INSTRUCTIONS[dtype])


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let a CPU multiply float32 matrices whose numbers are all of a narrower dtype by that dtype's instructions.

    Nothing is lost: products are added up in float32. One thread at a time.
    """
    flags = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when torch is imported
    before = flags.fp32_precision
    if dtype == torch.bfloat16 and has_instructions(dtype):
        flags.fp32_precision = "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before


def computing_dtype(stored: torch.dtype | None) -> tuple[str, str]:
    """Choose what to compute in, by the machine.

    Args:
        stored: The dtype of the model's weights.

    Returns:
        The dtype's name ("auto" where the model has none of its own), and the choice in a sentence.
    """
    if stored is None:
        return "auto", "computing in the dtype of the model's weights (dtype auto)"
    if has_instructions(stored):
        return named(stored), f"computing in {named(stored)}, the model's own dtype (dtype auto)"
    return "float32", (
        f"computing in float32: this CPU has no instructions for {named(stored)}, the model's own dtype, in which the "
        "checkpoint is saved (dtype auto)"
    )


def saved_dtype(computed: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """Return the dtype to save in: the base model's, but no wider than was computed in.

    >>> saved_dtype(torch.float32, torch.bfloat16), saved_dtype(torch.bfloat16, torch.float32)
    (torch.bfloat16, torch.bfloat16)
    """
    return stored if stored is not None and stored.itemsize < computed.itemsize else computed


def store_in(directory: Path, dtype: torch.dtype, computed: torch.dtype = torch.float32) -> None:
    """Write a checkpoint's tensors again in another dtype, file by file.

    What a quantization packed is left as it is; its scales follow, as they do where a model is loaded in that dtype.

    Args:
        directory: With safetensors files and a ``config.json``.
        dtype: To store in.
        computed: Tensors of this dtype are cast.
    """
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        for name, tensor in tensors.items():
            if tensor.dtype == computed and not name.endswith(KEPT_WIDE):
                tensors[name] = tensor.to(dtype)
        total += sum(tensor.nbytes for tensor in tensors.values())
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        partial.replace(path)
    for path, change in (
        (directory / "config.json", {"dtype": named(dtype)}),
        (directory / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}}),
    ):
        if path.is_file():
            document = json.loads(path.read_bytes())
            nested = {key: document.get(key, {}) | value for key, value in change.items() if isinstance(value, dict)}
            text = json.dumps(document | change | nested, indent=2, sort_keys=True)
            write_atomically(path, f"{text}\n".encode())
