"""Checkpoints loaded by transformers alone, in a process where this package cannot be imported."""

from __future__ import annotations

import atexit
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from amoeba_plugin.runtime.compat import cache_name

RELOAD = """
import sys, traceback
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"amoeba_plugin", "llmcompressor"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
@torch.no_grad()
def measure(directory, tokens):
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{directory.name}: {report}")
    steps, cache, name = [], None, cache_name(model)
    for position in range(tokens.shape[1]):
        step = model(tokens[:, position:position + 1], use_cache=True, **{name: cache})
        cache = getattr(step, name)
        steps.append(step.logits)
    return {directory.name: model(tokens, use_cache=False).logits, f"{directory.name}.cached": torch.cat(steps, 1)}
for line in sys.stdin:
    root = Path(line.strip())
    try:
        tokens, found = load_file(root / "tokens.safetensors")["tokens"], {}
        for directory in sorted(path for path in root.iterdir() if path.is_dir()):
            found |= measure(directory, tokens)
        save_file(found, root / "found.safetensors")
        print("done", flush=True)
    except Exception:
        print(traceback.format_exc().replace("\\n", " | "), flush=True)
"""


@cache
def _reloader() -> subprocess.Popen[str]:
    # One process for all architectures: importing transformers is most of what it does.
    # What it needs of this package, which it cannot import, is in its text.
    program = f"from __future__ import annotations\nimport inspect\n{inspect.getsource(cache_name)}\n{RELOAD}"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # closes its input, at which it ends
    return process


def reload_plainly(root: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Load every checkpoint under a directory in a process where this package cannot be imported.

    Args:
        root: Holds one directory per checkpoint.
        tokens: (batch, positions) int64.

    Returns:
        By directory name the logits, (batch, positions, vocabulary), and under ``NAME.cached`` those of feeding one
        token after the other to a cache.

    Raises:
        AssertionError: If transformers cannot load one, or misses or does not expect a key.
    """
    save_file({"tokens": tokens}, root / "tokens.safetensors")
    process = _reloader()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{root}\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    assert answer == "done", answer
    return load_file(root / "found.safetensors")
