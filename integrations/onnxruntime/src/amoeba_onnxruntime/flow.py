"""The flow ``onnxruntime``: ONNX by onnxruntime-genai's model builder, run by onnxruntime in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from amoeba_plugin.deployment.engines.process import EngineCommand, EngineProcess, python_with
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, Exporter, written
from amoeba_plugin.errors import ArchitectureError, DeploymentError

PYTHON = "AMOEBA_ONNXRUNTIME_PYTHON"  # an environment variable: a Python that has the packages, where this one must not
NEEDED = {
    "onnxruntime": "onnxruntime", "onnxruntime_genai": "onnxruntime-genai", "onnx": "onnx", "onnx_ir": "onnx-ir",
}  # fmt: skip
HERE = Path(__file__).parent

ALONE = """
import json
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session, tokenizer = onnxruntime.InferenceSession("model.onnx"), Tokenizer.from_file("tokenizer.json")
model = json.load(open("genai_config.json"))["model"]
empty = np.zeros((1, model["decoder"]["num_key_value_heads"], 0, model["decoder"]["head_size"]), np.float32)
caches = [each.name for each in session.get_outputs()[1:]]
feed = {name.replace("present", "past_key_values"): empty for name in caches}
tokens = tokenizer.encode("The capital of France is").ids
new, ends = tokens, np.ravel(model["eos_token_id"])
for _ in range(32):
    feed |= {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    logits, *computed = session.run(["logits", *caches], feed)
    feed |= {name.replace("present", "past_key_values"): each for name, each in zip(caches, computed)}
    new = [int(logits[0, -1].argmax())]
    if new[0] in ends:
        break
    tokens = tokens + new
print(tokenizer.decode(tokens))
"""
GENAI = """
import onnxruntime_genai as genai
from tokenizers import Tokenizer

model, tokenizer = genai.Model("."), Tokenizer.from_file("tokenizer.json")
tokens = tokenizer.encode("The capital of France is").ids
options = genai.GeneratorParams(model)
options.set_search_options(max_length=len(tokens) + 32)
generator = genai.Generator(model, options)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""


class OnnxRuntime(DeploymentFlow):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    schemes: Mapping[str, str] = {
        "fp32": "single precision",
        "int4": "4 bits, blocks of 32, output and tied embeddings too; what is multiplied with them is rounded to 8",
    }
    exact = frozenset({"fp32"})

    def command(self) -> EngineCommand:
        """Return the Python that has onnxruntime."""
        return EngineCommand(HERE / "engine.py", python_with(NEEDED, self.name, PYTHON))

    def export(self, subnet: Path, scheme: str, directory: Path) -> Export:
        """Run the builder."""
        with self.exporting() as export:
            return export(subnet, scheme, directory)

    @contextmanager
    def exporting(self) -> Iterator[Exporter]:
        """Keep one builder: to start it takes longer than to export a small model."""
        command = EngineCommand(HERE / "exporter.py", python_with(NEEDED, self.name, PYTHON), {"HF_HUB_OFFLINE": "1"})
        with EngineProcess("ONNX Runtime's model builder", command) as builder:

            def export(subnet: Path, scheme: str, directory: Path) -> Export:
                self.require_scheme(scheme)
                _require_held(subnet, self.name, scheme)
                asked = {"subnet": str(subnet), "scheme": scheme, "directory": str(directory)}
                return written(directory, ".", builder.ask("build", **asked).value)

            yield export

    def ways_to_run(self, export: Export) -> list[tuple[str, str, str]]:
        """Return programs; onnxruntime-genai's own tokenizer reads some text otherwise, so neither uses it."""
        if "tokenizer.json" not in export.files:
            return []  # with no text to begin with
        return [
            ("In Python, with `pip install onnxruntime numpy tokenizers`", "python", ALONE),
            ("In Python, with `pip install onnxruntime-genai tokenizers`", "python", GENAI),
        ]


def _require_held(subnet: Path, engine: str, scheme: str) -> None:
    """Refuse a checkpoint by the engine's rules: of what it has no place for, the builder writes something else."""
    from amoeba_plugin.deployment.rules import candidate, require_loadable
    from amoeba_plugin.models.registry import architecture_of
    from amoeba_plugin.runtime.model_files import load_config

    try:
        config = load_config(str(subnet))
        require_loadable(candidate(config, architecture_of(config), engine, scheme), engine)
    except ArchitectureError as error:
        raise DeploymentError(str(error)) from error
