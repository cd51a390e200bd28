"""What torch computes: the flow ``torch``, of subnet checkpoints in fp32 or bf16 and of an elastic model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from amoeba_plugin.deployment.engines import process
from amoeba_plugin.deployment.engines.process import EngineCommand
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, written
from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.extraction.parity import with_parameters_in
from amoeba_plugin.runtime.dtypes import named, stored_dtype
from amoeba_plugin.runtime.model_files import copy_tokenizer

ELASTIC = "elastic"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RUN = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("."{trust}), AutoTokenizer.from_pretrained(".")
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
"""


class Torch(DeploymentFlow):
    """transformers on the CPU; ``torch:elastic`` is the elastic model with its adapter at a shape, nothing cut out."""

    name = "torch"
    schemes: Mapping[str, str] = {
        "fp32": "single precision", "bf16": "half the bytes; slow where the CPU has no instructions for it",
        ELASTIC: "the elastic model at a shape, as a service keeps it",
    }  # fmt: skip
    exact = frozenset({"fp32"})
    bits: Mapping[str, tuple[float, float]] = {"bf16": (16, 16)}

    def command(self) -> EngineCommand:
        """Return this Python."""
        return EngineCommand(Path(process.__file__).with_name("torch_engine.py"))

    def runs_elastic(self, scheme: str) -> bool:
        """Tell whether a scheme is of the elastic model."""
        return scheme == ELASTIC

    def options(self, scheme: str) -> dict[str, Any]:
        """Return the dtype."""
        return {} if scheme == ELASTIC else {"dtype": named(DTYPES[scheme])}

    def ways_to_run(self, export: Export) -> list[tuple[str, str, str]]:
        """Return five lines of Python."""
        trust = ", trust_remote_code=True" if PER_LAYER_FILE in export.files else ""
        return [("In Python", "python", RUN.format(trust=trust))]

    def export(self, subnet: Path, scheme: str, directory: Path) -> Export:
        """Write the checkpoint in the scheme's dtype."""
        if scheme == ELASTIC:
            raise DeploymentError("torch:elastic runs an elastic checkpoint as it is; export torch:fp32 or torch:bf16")
        from amoeba_plugin.deployment.engines.torch_engine import load_checkpoint  # seconds to import

        dtype = DTYPES[scheme]
        if stored_dtype(str(subnet)) == dtype:
            shutil.copytree(subnet, directory, dirs_exist_ok=True)
        else:
            with_parameters_in(load_checkpoint(subnet, dtype), dtype).save_pretrained(directory)
            copy_tokenizer(str(subnet), directory)
        return written(directory, ".", _types(directory))


def _types(directory: Path) -> dict[str, int]:
    """Return how many tensors of which type the files hold, as they name them."""
    types: Counter[str] = Counter()
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            types.update(stored.get_slice(name).get_dtype() for name in stored.keys())  # noqa: SIM118
    return dict(types)
