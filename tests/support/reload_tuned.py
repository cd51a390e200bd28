"""Prints the logits of a tuned model's exits, loaded from a directory, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from amoeba_plugin.training.layer_tuning.files import load_tuned


@torch.no_grad()
def main(directory: Path, output: Path) -> None:
    """Write the logits of every exit on tokens 3 to 14."""
    model, exits = load_tuned(directory)
    found = {}
    for depth in exits.depths:
        with exits.active(depth):
            found[str(depth)] = model(torch.arange(3, 15)[None], use_cache=False).logits
    save_file(found, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
