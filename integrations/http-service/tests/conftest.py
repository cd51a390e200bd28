"""A random elastic model, its files, and started servers; no hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import typer
from amoeba_http_service.command import serve
from openai import OpenAI
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from amoeba_plugin.cli import AmoebaGroup
from amoeba_plugin.deployment.deploy import deploy_shape
from amoeba_plugin.deployment.profiling.asked import subject_of
from amoeba_plugin.deployment.profiling.profile import (
    FlowProfile,
    Profile,
    Round,
    Seconds,
    ShapeCost,
    config_digest,
    this_machine,
)
from amoeba_plugin.deployment.profiling.work import Work
from amoeba_plugin.elastic.checkpoint import load_elastic, save_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.testing.flows import CONFIG, tokenizer
from amoeba_plugin.testing.random_models import attach_random_smol, random_model, random_strategy

PROGRAM = """
import sys, typer
from amoeba_http_service.command import serve
from amoeba_plugin.cli import AmoebaGroup
app = typer.Typer(cls=AmoebaGroup, pretty_exceptions_enable=False)
app.callback()(lambda: None)
app.command("serve")(serve)
{changed}
app()
"""
# In place of a compact model: every other token that may go goes, whatever the targets are.
DROPPING = """
from fractions import Fraction
import amoeba_http_service.resident as resident
from amoeba_plugin.serving.feasible import Decision
from amoeba_plugin.serving.reading import Reading
service = resident.ElasticService
resident.ElasticService = lambda backend, latency_of, decider, reader, **options: service(
    backend, latency_of, lambda found, reading: Decision(backend.space.largest, Fraction(1, 2)),
    lambda request: Reading([position % 2 for position in range(len(request.tokens))]), **options,
)
"""
FILES = ("4x1", "3x1/2")
STARTS = 300  # seconds, at most
TOKEN = "a-token-of-this-test"
STRICT = ("--max-waiting", "3", "--max-prompt", "120", "--max-tokens", "300", "--max-body", "4096")


@dataclass
class Started:
    """A server in a process of its own.

    Attributes:
        url: Where it answers.
        process: Its.
        said: Lines that it wrote.
        token: That it wants.
    """

    url: str
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    token: str = ""

    @cached_property
    def openai(self) -> OpenAI:
        """The official client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.token or "none", max_retries=0, timeout=60)

    @cached_property
    def http(self) -> httpx.Client:
        """A client of HTTP alone."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def close(self) -> None:
        """Close the clients."""
        self.openai.close()
        self.http.close()

    def figure(self, name: str, **labels: str) -> float:
        """Return what /metrics says of a name; 0 where it says nothing."""
        text = self.http.get("/metrics").text
        told = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        found = re.search(rf"^{name}{re.escape('{' + told + '}') if told else ''} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until something holds."""
        for _ in range(int(seconds / 0.02)):
            if holds():
                return
            time.sleep(0.02)
        raise AssertionError("it did not come to hold")


Start = Callable[..., AbstractContextManager[Started]]


@pytest.fixture(scope="session")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an elastic checkpoint of a random model, with an adapter, and a tokenizer with a chat template."""
    directory = tmp_path_factory.mktemp("model")
    model = random_model(CONFIG)
    with torch.no_grad():  # random ones are too loud: predictions of one token alone tell little of the others
        model.get_output_embeddings().weight.mul_(0.2)
    model.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    live = ElasticModel(model, random_strategy(model))
    save_elastic(live, attach_random_smol(live), directory / "elastic", str(directory / "base"))
    return directory / "elastic"


@pytest.fixture(scope="session")
def amoeba() -> Callable[..., Any]:
    """Return what runs ``amoeba serve`` with arguments, in this process."""

    def run(*arguments: object, token: str = "") -> Any:
        app = typer.Typer(cls=AmoebaGroup)
        app.callback()(lambda: None)
        app.command("serve")(serve)
        environment = {"COLUMNS": "200", "AMOEBA_SERVE_TOKEN": token}
        return CliRunner().invoke(app, ["serve", *map(str, arguments)], env=environment)

    return run


@pytest.fixture(scope="session")
def profile(elastic: Path) -> Path:
    """Return a profile of its shapes on this machine, whose times are made up: a token takes 1 to 2 ms."""
    subject = subject_of(str(elastic), None, [], [])
    sizes = {str(shape): astuple(Work.of(subject.sizes(shape))) for shape in subject.space}
    largest = sum(max(sizes.values(), key=sum))

    def visit(share: float) -> Round:
        took = {tokens: Seconds(wall=seconds, cpu=seconds) for tokens in (8, 64) for seconds in [share * tokens * 5e-5]}
        each = Seconds(wall=share * 2e-3, cpu=share * 2e-3)
        return Round(load=each, prefill=took, decode=each, peak=1)

    shapes = {name: ShapeCost(work=work, bytes=1, rounds=[visit(sum(work) / largest)]) for name, work in sizes.items()}
    flow = FlowProfile(engine={}, threads=1, batch=1, decoded=4, shapes=shapes, adapted=subject.adapted_by)
    files = flow.model_copy(update={"adapted": ""})
    found = Profile(
        model="random", digest=config_digest(subject.config), sizes=sizes, machine=this_machine(),
        flows={"torch:elastic": flow, "torch:fp32": files, "llama-cpp:Q8_0": files},
    )  # fmt: skip
    found.save(elastic.parent / "profile.json")
    return elastic.parent / "profile.json"


@pytest.fixture(scope="session")
def start(elastic: Path, profile: Path) -> Start:
    """Return ``start(*options, token="")``: a server on any free port, ended with the block, of ``models`` if not of
    the elastic checkpoint."""

    @contextmanager
    def started(
        *options: str, token: str = "", changed: str = "", models: Sequence[Path] = (elastic,)
    ) -> Iterator[Started]:
        program = PROGRAM.format(changed=changed)
        asked = ["serve", *map(str, models), "--port", "0", "--profile", str(profile)]
        command = [sys.executable, "-c", program, *asked]
        environment = {**os.environ, "AMOEBA_SERVE_TOKEN": token, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment,
            start_new_session=True,  # as a terminal's foreground, which Ctrl-C goes to all of
        )  # fmt: skip
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)
        reader.start()
        try:
            server = Started(_address(process, said), process, said, token)
            try:
                yield server
            finally:
                server.close()
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()
                process.wait()
                reader.join()
                process.stderr.close()

    return started


@pytest.fixture(scope="session")
def deployed(elastic: Path) -> list[Path]:
    """Return two shapes of it as ``amoeba deploy`` writes them for torch."""
    found = [elastic.parent / "file0", elastic.parent / "file1"]
    for shape, directory in zip(FILES, found, strict=True):
        deploy_shape(elastic, shape, "torch:fp32", directory)
    return found


@pytest.fixture(scope="session")
def files(start: Start, deployed: list[Path]) -> Iterator[Started]:
    """A server of these files."""
    with start(models=deployed) as found:
        yield found


@pytest.fixture(scope="session")
def server(start: Start) -> Iterator[Started]:
    """A server that tests share."""
    with start() as found:
        yield found


@pytest.fixture(scope="session")
def strict(start: Start) -> Iterator[Started]:
    """Another, which wants a token, takes little, and leaves out half of what may be left out."""
    with start(*STRICT, token=TOKEN, changed=DROPPING) as found:
        yield found


@pytest.fixture(scope="session")
def live(elastic: Path) -> ElasticModel:
    """Return the model that servers have, in this process."""
    return load_elastic(elastic)[0]


@pytest.fixture(scope="session")
def known(elastic: Path) -> Any:
    """Return its tokenizer."""
    return AutoTokenizer.from_pretrained(elastic.parent / "base")


@pytest.fixture(scope="session")
def alone() -> Callable[[PreTrainedModel, list[int], int], list[tuple[int, float]]]:
    """Return what computes greedy tokens with their log-probabilities, the whole sequence anew for each."""

    def computed(model: PreTrainedModel, prompt: list[int], count: int) -> list[tuple[int, float]]:
        tokens, found = list(prompt), []
        with torch.no_grad():
            for _ in range(count):
                row = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
                tokens.append(int(row.argmax()))
                found.append((tokens[-1], float(row.max())))
        return found

    return computed


def _address(process: subprocess.Popen[str], said: list[str]) -> str:
    for _ in range(STARTS * 20):
        found = re.search(r"answers at (http://\S+)/v1", "".join(said))
        if found:
            return found[1]
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}: {''.join(said)}")
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {''.join(said)}")
