"""Several deployed files of one engine, resident side by side: each shape in a process of its own."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from amoeba_plugin.deployment.deployed import read_opening, running
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.shape import ShapeSpace, SubnetShape

MOST_LIKELY = 64  # tokens whose probabilities an engine is asked for in every step; the rest share what is left


@dataclass(frozen=True)
class ResidentShapes(ShapeSpace):
    """Of a grid the shapes that have a file."""

    shapes: tuple[SubnetShape, ...] = ()

    @property
    def largest(self) -> SubnetShape:
        """The first, by depth and width."""
        return max(self.shapes)

    @property
    def smallest(self) -> SubnetShape:
        """The last, by depth and width."""
        return min(self.shapes)

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

    def __init__(self, number: int) -> None:
        self.number = number


class FilesBackend:
    """Deployed directories of one ``flow:scheme``, all resident; a context manager.

    What an engine tells is exact for the likeliest tokens; the others get an equal share of what is left, so that the
    likeliest token is the engine's, and drawn ones are nearly so.

    Args:
        directories: That ``amoeba deploy`` wrote, one for each shape.
        vocabulary: Tokens of the model.
        context: Tokens that a prompt and its answer may have together.
        threads: Of each engine; one of them computes at a time.
        requests: That may be computed in turns at one shape without being computed anew.
        most: Likeliest tokens that an engine is asked for.

    Raises:
        ArtifactError: If a directory was not deployed, or they are of several engines, or two of one shape.
    """

    def __init__(
        self, directories: Sequence[Path], vocabulary: int, context: int, threads: int = 1, requests: int = 4,
        most: int = MOST_LIKELY,
    ) -> None:  # fmt: skip
        self._directories, self._vocabulary = _by_shape(directories), vocabulary
        self._context, self._threads, self._requests, self._most = context, threads, requests, most
        self._engines: dict[SubnetShape, EngineProcess] = {}
        self._numbers, self._open = itertools.count(), ExitStack()
        self._over: dict[SubnetShape, list[int]] = {shape: [] for shape in self._directories}

    def __enter__(self) -> FilesBackend:
        with ExitStack() as opened:
            for shape, directory in self._directories.items():
                engine = running(directory, self._context, self._threads, self._requests)
                self._engines[shape] = opened.enter_context(engine)
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def space(self) -> ShapeSpace:
        """The shapes that have a file."""
        shapes = tuple(self._directories)
        return ResidentShapes(tuple(each.depth for each in shapes), tuple(each.width for each in shapes), shapes)

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together."""
        return self._context

    def prefill(self, shape: SubnetShape, tokens: Sequence[int]) -> tuple[Followed, Tensor]:
        """Compute a prompt; see :class:`Backend`."""
        request = Followed(next(self._numbers))
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
        while over:
            engine.ask("forget", request=over.pop())
        told = engine.ask("follow", request=request.number, tokens=list(tokens), most=self._most).value
        ids, log_probabilities = told
        return logits_of(ids, log_probabilities, self._vocabulary)


def logits_of(ids: Sequence[int], log_probabilities: Sequence[float], vocabulary: int) -> Tensor:
    """Return log-probabilities of a whole vocabulary, (vocabulary,), of which some are known.

    >>> logits_of([2, 0], [-0.5, -2.0], vocabulary=4).exp().sum()
    tensor(1.)
    """
    left, others = 1 - math.fsum(map(math.exp, log_probabilities)), vocabulary - len(ids)
    found = torch.full((vocabulary,), math.log(max(left, 1e-30) / others) if others else -math.inf)
    found[list(ids)] = torch.tensor(list(log_probabilities))
    return found


def _by_shape(directories: Sequence[Path]) -> dict[SubnetShape, Path]:
    openings = [(directory, *read_opening(directory)) for directory in directories]
    points = sorted({point for _, point, _ in openings})
    if len(points) != 1:
        raise ArtifactError(f"one engine serves all shapes, and these are of {', '.join(points) or 'none'}")
    found = {SubnetShape.parse(opening.shape): directory for directory, _, opening in openings}
    if len(found) < len(openings):
        raise ArtifactError("two of the directories hold the same shape; name each shape once")
    return found
