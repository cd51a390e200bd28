"""What an engine is to this package: what it can hold, how a subnet gets into its format, how it is run.

A `DeploymentFlow` is an engine, and ``flow:scheme`` a point that a user names (``llama-cpp:Q4_0``). A flow computes
nothing itself: its engine runs in a process of its own, by an engine file (``engines/child.py`` says how it is spoken
to) which defines a class ``Engine`` with these methods; tokens are lists of ids.

- ``about() -> dict``: what computes, and its version.
- ``load(path, threads, context, batch, **options)``: what the flow exported, with the flow's options of the scheme.
- ``prefill(prompts)``: computes prompts of one length, ready to decode.
- ``decode(count)``: decodes so many tokens behind them, whatever they are.
- ``log_probabilities(tokens, behind) -> list[str]``: of the whole vocabulary, behind each number of tokens, base64 of
  little-endian fp32.
- ``token_log_probabilities(tokens, behind) -> list[float]``: of the token that follows each number of tokens, which
  ascend. An engine need not have it: it is picked from ``log_probabilities`` then.
- ``follow(request, tokens, most) -> [ids, log-probabilities]``: the ``most`` likeliest tokens behind ``tokens``, which
  come behind those that earlier calls gave this request; log-probabilities are of the whole vocabulary. An engine need
  not have it, but only one that has can serve requests side by side; it is told by ``load(..., requests=count)`` how
  many there will be at a time, each of ``context`` tokens, and by ``forget(request)`` that one is over.
- ``tokenize(texts) -> list[list[int]]``: without special tokens added.
- ``render(messages) -> str``: a chat as the exported template writes it, ready for an answer.
- ``generate(prompt, count) -> str``: what follows, greedily.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_plugin.deployment.engines.process import EngineCommand
from amoeba_plugin.errors import DeploymentError, did_you_mean

SEPARATOR = ":"


@dataclass(frozen=True)
class Point:
    """An engine at a scheme; ``str`` writes it as a user names it."""

    flow: str
    scheme: str

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read ``flow:scheme``.

        >>> Point.parse("llama-cpp:Q4_0")
        Point(flow='llama-cpp', scheme='Q4_0')

        Raises:
            DeploymentError: If it is nothing of the kind.
        """
        flow, _, scheme = text.strip().partition(SEPARATOR)
        if not flow or not scheme:
            raise DeploymentError(f"'{text}' names no engine at a scheme; write FLOW:SCHEME, such as torch:fp32")
        return cls(flow, scheme)

    def __str__(self) -> str:
        return f"{self.flow}{SEPARATOR}{self.scheme}"


@dataclass(frozen=True)
class Export:
    """What a flow made of a subnet.

    Attributes:
        entry: What the engine loads, relative to the directory: a file, or "." for all of it.
        files: Bytes of each, by name.
        tensor_types: How many tensors came out as which type.
    """

    entry: str
    files: Mapping[str, int]
    tensor_types: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    @property
    def in_words(self) -> str:
        """Size and tensor types."""
        types = ", ".join(f"{count} {name}" for name, count in self.tensor_types.items())
        files = f"{len(self.files)} file{'s' * (len(self.files) > 1)}"
        return f"{self.bytes / 1e6:.1f} MB in {files}{f'; tensors: {types}' if types else ''}"


Exporter = Callable[[Path, str, Path], Export]


class DeploymentFlow(ABC):
    """An engine that exports subnet checkpoints and runs them. Subclass it, and hand it over by the hook
    ``amoeba_deployment_flows``.

    Attributes:
        name: As users name it.
        schemes: What weights can be, by name: what a scheme is, in a sentence.
        rules: File with what the engine can load (``rules.py`` says how it is written); of engines that this package
            has rules of, it takes their place.
        exact: Schemes whose logits are those of the subnet in torch, but for rounding.
        bits: By scheme how many bits a weight takes on disk, at most: in a layer, and outside of all. Of schemes that
            are not named 32 are assumed, when it is told beforehand what room there has to be.
    """

    name: str
    schemes: Mapping[str, str]
    exact: frozenset[str] = frozenset()
    bits: Mapping[str, tuple[float, float]] = {}
    rules: Path | None = None

    def require_scheme(self, scheme: str) -> None:
        """Refuse a scheme that it has not, or that cannot run on this machine.

        Raises:
            DeploymentError: With those that it has.
        """
        if scheme not in self.schemes:
            known = ", ".join(f"{name} ({what})" for name, what in self.schemes.items())
            raise DeploymentError(
                f"{self.name} has no scheme '{scheme}'.{did_you_mean(scheme, self.schemes)} It has {known}"
            )

    def bytes_of(self, scheme: str, layers: int, outside: int) -> int:
        """Return the bytes that weights take at a scheme, at most, before they are there.

        Args:
            scheme: One of its own.
            layers: Weights of all layers.
            outside: The others: embeddings, head, last norm.
        """
        each, other = self.bits.get(scheme, (32, 32))
        return math.ceil((each * layers + other * outside) / 8)

    @abstractmethod
    def command(self) -> EngineCommand:
        """Return how its engine is started.

        Raises:
            DeploymentError: If what it needs is not installed, with how it is.
        """

    def runs_elastic(self, scheme: str) -> bool:
        """Tell whether a scheme runs every shape of an elastic checkpoint, and exports nothing."""
        return False

    def options(self, scheme: str) -> dict[str, Any]:
        """Return what ``load`` is told of a scheme beside threads and sizes."""
        return {}

    def exact_options(self, scheme: str) -> dict[str, Any]:
        """Return what ``load`` is told besides where logits are compared, not times: say, to round no cache."""
        return {}

    def ways_to_run(self, export: Export) -> list[tuple[str, str, str]]:
        """Return commands that run an export where it lies: a title, the language, and the text of each."""
        return []

    @contextmanager
    def exporting(self) -> Iterator[Exporter]:
        """Have :meth:`export` for a block of code, where several exports can share what takes long to start."""
        yield self.export

    @abstractmethod
    def export(self, subnet: Path, scheme: str, directory: Path) -> Export:
        """Write a subnet checkpoint as the engine loads it.

        Args:
            subnet: As ``amoeba extract`` writes it.
            scheme: One of its own.
            directory: Exists, and is empty.

        Raises:
            DeploymentError: If the engine cannot hold it, or its converter fails.
        """


def written(directory: Path, entry: str, tensor_types: Mapping[str, int]) -> Export:
    """Return the export that a directory holds."""
    files = {
        str(each.relative_to(directory)): each.stat().st_size for each in sorted(directory.rglob("*")) if each.is_file()
    }
    return Export(entry, files, tensor_types)
