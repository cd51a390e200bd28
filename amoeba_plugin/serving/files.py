"""Several deployed files of one engine, resident side by side: each shape in a process of its own."""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from amoeba_plugin.deployment.deployed import running
from amoeba_plugin.deployment.deployed_shapes import DeployedShapes
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.registry import point_named
from amoeba_plugin.errors import DeploymentError, ShapeError
from amoeba_plugin.shape import ShapeSpace, SubnetShape

logger = logging.getLogger(__name__)
MOST_LIKELY = 64  # tokens whose probabilities an engine is asked for in every step; the rest share what is left


@dataclass(frozen=True)
class ResidentShapes(ShapeSpace):
    """Of a grid the shapes that have a file."""

    shapes: tuple[SubnetShape, ...] = ()

    @classmethod
    def of(cls, shapes: Collection[SubnetShape]) -> ResidentShapes:
        """Return the space of some shapes."""
        return cls(tuple(each.depth for each in shapes), tuple(each.width for each in shapes), tuple(shapes))

    @property
    def largest(self) -> SubnetShape:
        """The first, by depth and width."""
        return max(self.shapes)

    @property
    def smallest(self) -> SubnetShape:
        """The last, by depth and width."""
        return min(self.shapes)

    def require(self, shape: SubnetShape | str) -> SubnetShape:
        """Return the shape, parsed.

        Raises:
            ShapeError: If it has no file.
        """
        parsed = SubnetShape.parse(shape)
        if parsed not in self:
            raise ShapeError(f"there is no file of shape {parsed}: there are {self}; take one of them, or deploy it")
        return parsed

    def __contains__(self, shape: object) -> bool:
        return shape in self.shapes

    def __iter__(self) -> Iterator[SubnetShape]:
        return iter(sorted(self.shapes, reverse=True))

    def __len__(self) -> int:
        return len(self.shapes)

    def __str__(self) -> str:
        return ", ".join(map(str, self))


class Followed:
    """A request that an engine keeps keys and values of, until nobody holds this any more."""

    def __init__(self, number: int, engine: EngineProcess) -> None:
        self.number, self.engine = number, engine


class FilesBackend:
    """Deployed directories of one ``flow:scheme``, all resident; a context manager.

    What an engine tells is exact for the likeliest tokens; the others get an equal share of what is left, so that the
    likeliest token is the engine's, and drawn ones are nearly so. An engine that fails is started again for the
    requests to come; those that it was computing fail.

    Args:
        directories: That ``amoeba deploy`` wrote, one for each shape.
        vocabulary: Tokens of the model.
        context: Tokens that a prompt and its answer may have together.
        threads: Of each engine; one of them computes at a time.
        requests: That may be computed in turns at one shape without being computed anew.
        most: Likeliest tokens that an engine is asked for.

    Attributes:
        switches: How often another shape computed than in the step before.

    Raises:
        ArtifactError: If a directory was not deployed, or they are of several engines, or two of one shape.
    """

    def __init__(
        self, directories: Sequence[Path], vocabulary: int, context: int, threads: int = 1, requests: int = 4,
        most: int = MOST_LIKELY,
    ) -> None:  # fmt: skip
        self._directories, self._vocabulary = DeployedShapes.of(directories).directories, vocabulary
        self._context, self._threads, self._requests, self._most = context, threads, requests, most
        self._engines: dict[SubnetShape, EngineProcess] = {}
        self._numbers, self._open = itertools.count(), ExitStack()
        self._over: dict[SubnetShape, list[int]] = {shape: [] for shape in self._directories}
        self._last: SubnetShape | None = None
        self.switches = 0

    def __enter__(self) -> FilesBackend:
        with self._open as opened:
            for shape in self._directories:
                self._start(shape)
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def space(self) -> ShapeSpace:
        """The shapes that have a file."""
        return ResidentShapes.of(self._directories)

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together."""
        return self._context

    def prefill(self, shape: SubnetShape, tokens: Sequence[int]) -> tuple[Followed, Tensor]:
        """Compute a prompt; see :class:`Backend`."""
        request = Followed(next(self._numbers), self._engines[shape])
        weakref.finalize(request, self._over[shape].append, request.number)  # told with the next step: one thread asks
        return request, self._follow(shape, request, tokens)

    def step(self, shape: SubnetShape, cache: Followed, token: int) -> Tensor:
        """Compute one more token; see :class:`Backend`."""
        return self._follow(shape, cache, [token])

    @property
    def at_once(self) -> int:
        """One: an engine is told a token of one request at a time."""
        return 1

    def steps(self, shape: SubnetShape, caches: Sequence[Followed], tokens: Sequence[int]) -> Sequence[Tensor]:
        """Compute the next token of one request; see :class:`Backend`."""
        return [self.step(shape, cache, token) for cache, token in zip(caches, tokens, strict=True)]

    def _follow(self, shape: SubnetShape, request: Followed, tokens: Sequence[int]) -> Tensor:
        engine, over = self._engines[shape], self._over[shape]
        if request.engine is not engine:
            raise DeploymentError(f"the engine of {shape} ended, and with it what was computed of the request")
        self.switches += self._last not in (None, shape)
        self._last = shape
        try:
            while over:
                engine.ask("forget", request=over.pop())
            told = engine.ask("follow", request=request.number, tokens=list(tokens), most=self._most).value
        except DeploymentError:
            logger.warning("the engine of %s failed, and is started again", shape)
            self._start(shape)
            raise
        ids, log_probabilities = told
        return logits_of(ids, log_probabilities, self._vocabulary)

    def _start(self, shape: SubnetShape) -> None:
        engine = running(self._directories[shape], self._context, self._threads, self._requests)
        self._engines[shape] = self._open.enter_context(engine)


def require_followed(point: str) -> None:
    """Refuse an engine that cannot compute several requests in turns.

    Raises:
        DeploymentError: If it cannot, is missing, or fails.
    """
    flow, _ = point_named(point)
    with EngineProcess(flow.name, flow.command()) as engine:
        if not engine.ask("has", method="follow").value:
            raise DeploymentError(
                f"{point} cannot be served: its engine has no method `follow`, which computes requests in turns; "
                "deploy the shapes for torch or llama-cpp, which have it"
            )


def logits_of(ids: Sequence[int], log_probabilities: Sequence[float], vocabulary: int) -> Tensor:
    """Return log-probabilities of a whole vocabulary, (vocabulary,), of which some are known.

    >>> logits_of([2, 0], [-0.5, -2.0], vocabulary=4).exp().sum()
    tensor(1.)
    """
    left, others = 1 - math.fsum(map(math.exp, log_probabilities)), vocabulary - len(ids)
    found = torch.full((vocabulary,), math.log(max(left, 1e-30) / others) if others else -math.inf)
    found[list(ids)] = torch.tensor(list(log_probabilities))
    return found
