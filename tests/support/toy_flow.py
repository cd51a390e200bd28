"""A deployment flow whose engine computes nothing for as long as a shape's sizes say."""

from __future__ import annotations

from pathlib import Path

from amoeba_plugin.deployment.engines.process import EngineCommand
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, written

ENGINE = """
import json, pathlib, time
def work(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
class Engine:
    def about(self):
        return {"engine": "toy", "version": "1"}
    def load(self, path, threads, context, batch, **options):
        config = json.loads(pathlib.Path(path, "config.json").read_text())
        if options.get("fails_at") == config["num_hidden_layers"]:
            raise MemoryError("too deep")
        self.layers, self.neurons = config["num_hidden_layers"], config["intermediate_size"]
        self.slow, self.slower = options["slow"], options.get("slower", 1)
    def prefill(self, prompts):
        work(self.slower * (1e-4 + len(prompts[0]) * self.layers * (2e-5 + 1e-8 * self.neurons)))
    def decode(self, count):
        work(self.slower * count * (self.layers * 5e-4 if self.slow == "layers" else self.neurons * 5e-6))
"""


class Toy(DeploymentFlow):
    name = "toy"
    schemes = {"deep": "slow by layers", "wide": "slow by neurons"}  # noqa: RUF012
    exact = frozenset({"deep", "wide"})

    def __init__(self, directory: Path, fails_at: int | None = None) -> None:
        self._file, self.fails_at, self.slower = directory / "engine.py", fails_at, 1
        self._file.write_text(ENGINE)

    def command(self) -> EngineCommand:
        return EngineCommand(self._file)

    def options(self, scheme: str) -> dict[str, object]:
        return {"slow": "layers" if scheme == "deep" else "neurons", "fails_at": self.fails_at, "slower": self.slower}

    def export(self, subnet: Path, scheme: str, directory: Path) -> Export:
        (directory / "config.json").write_bytes((subnet / "config.json").read_bytes())
        return written(directory, ".", {})
